// pygen._C: what is not a tensor op, and a short way to the dispatcher for one that is. Loading the module registers
// the ops with torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <ATen/Parallel.h>

#include "affine_call.h"
#include "checkpoint_header.h"
#include "program.h"
#include "pygen/affine_step.h"
#include "pygen/diffusion_loss.h"
#include "pygen/isa.h"
#include "pygen/philox_normal.h"

namespace py = pybind11;

namespace {

// (tensors, metadata, lengths of the arrays that are not in metadata), as csrc/checkpoint_header.h has them.
template <pygen::CheckpointHeader (*parse)(std::span<const uint8_t>)>
py::tuple parse_header(const py::buffer& file) {
  const py::buffer_info info = file.request();
  if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1) throw py::type_error("a file must be flat bytes");
  const pygen::CheckpointHeader header = parse({static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.size)});
  py::list tensors;
  for (const pygen::StoredTensor& tensor : header.tensors) {
    tensors.append(
        py::make_tuple(tensor.name, tensor.format, py::tuple(py::cast(tensor.shape)), tensor.begin, tensor.end));
  }
  py::dict metadata, lengths;
  for (const auto& [key, value] : header.metadata) metadata[py::str(key)] = py::cast(value);
  for (const auto& [key, length] : header.array_lengths) lengths[py::str(key)] = py::cast(length);
  return py::make_tuple(tensors, metadata, lengths);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "pygen's compiled half: importing it registers the operators of torch.ops.pygen.";

  module.def("isa", [] { return pygen::kIsaNames[static_cast<int>(pygen::isa())]; }, "The instruction set in use.");
  module.def(
      "set_isa", [](const char* name) { pygen::set_isa(name); }, py::arg("name"), "Change the instruction set in use.");
  module.def(
      "supported_isas",
      [] {
        py::list names;
        for (int i = 0; i <= static_cast<int>(pygen::best_isa()); ++i) names.append(pygen::kIsaNames[i]);
        return names;
      },
      "The instruction sets that are compiled in and that this processor supports.");
  module.def(
      "compiled_isas",
      [] {
        py::list names;
        for (const char* name : pygen::kIsaNames) names.append(name);
        return names;
      },
      "The instruction sets that are compiled in.");

  py::class_<pygen::Program>(module, "Program", "What ops launch on the CPU between start and stop, to be replayed.")
      .def(py::init<>())
      .def("start", &pygen::Program::start, "From here on this thread's ops add to the program instead of running.")
      .def("stop", &pygen::Program::stop)
      .def("__len__", &pygen::Program::size)
      .def("replay", [](const pygen::Program& program) {
        const py::gil_scoped_release release;
        program.replay(at::get_num_threads());
      });
  module.def("parse_safetensors", &parse_header<pygen::parse_safetensors>, py::arg("file"),
             "The header of a safetensors file; ValueError where it is malformed.");
  module.def("parse_gguf", &parse_header<pygen::parse_gguf>, py::arg("file"),
             "The header of a GGUF file; ValueError where it is malformed.");

  const auto call = PyCFunction_New(&pygen::affine_step_method, nullptr);
  module.attr("affine_step") = py::reinterpret_steal<py::object>(call);

#if defined(PYGEN_CUDA)
  module.attr("CUDA_BUILT") = true;
#else
  module.attr("CUDA_BUILT") = false;
#endif

  py::list columns;
  for (const char* name : pygen::kColumnNames) columns.append(name);
  module.attr("AFFINE_COLUMNS") = columns;
  py::list loss_columns;
  for (const char* name : pygen::kLossColumnNames) loss_columns.append(name);
  module.attr("LOSS_COLUMNS") = loss_columns;
  module.attr("MAX_HISTORY") = pygen::kMaxHistory;
  module.attr("DRAW_AFFINE_STEP") = static_cast<uint32_t>(pygen::kDrawAffineStep);
  module.attr("DRAW_TOKEN") = static_cast<uint32_t>(pygen::kDrawToken);
  module.attr("DRAW_UNMASK") = static_cast<uint32_t>(pygen::kDrawUnmask);
  module.attr("DRAW_POSTERIOR") = static_cast<uint32_t>(pygen::kDrawPosterior);
  module.attr("DRAW_ROUTE") = static_cast<uint32_t>(pygen::kDrawRoute);
  module.attr("DRAW_WATERMARK") = static_cast<uint32_t>(pygen::kDrawWatermark);
  module.attr("DRAW_VERIFY") = static_cast<uint32_t>(pygen::kDrawVerify);
  module.attr("DRAW_SAMPLE") = static_cast<uint32_t>(pygen::kDrawSample);
  module.attr("DRAW_DROPOUT") = static_cast<uint32_t>(pygen::kDrawDropout);
}
