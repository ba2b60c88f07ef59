// affine_step for Python without the boxing of its many arguments, which costs more than a small step's work.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "pygen/affine_step.h"

namespace pygen {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Text = std::optional<c10::string_view>;

const auto& affine_step_op() {
  using Op = void(const at::Tensor&, const MaybeTensor&, const at::Tensor&, const at::Tensor&, const MaybeTensor&,
                  const MaybeTensor&, at::TensorList, const MaybeTensor&, const MaybeTensor&, Text, const MaybeTensor&,
                  const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const at::Tensor&, const MaybeTensor&,
                  const MaybeTensor&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("pygen::affine_step", "").typed<Op>();
  return op;
}

// What Python gives for the op's arguments, by their places in its schema.
struct Arguments {
  PyObject* const* values;

  bool none(size_t i) const { return values[i] == Py_None; }
  void check(bool holds, size_t i, const char* what, PyObject* value) const {
    TORCH_CHECK_TYPE(holds, "affine_step: ", affine_step_op().schema().arguments()[i].name(), " must be ", what,
                     ", got ", Py_TYPE(value)->tp_name);
  }
  at::Tensor tensor(size_t i) const {
    check(THPVariable_Check(values[i]), i, "a tensor", values[i]);
    return THPVariable_Unpack(values[i]);
  }
  MaybeTensor maybe_tensor(size_t i) const { return none(i) ? MaybeTensor() : tensor(i); }
  c10::SmallVector<at::Tensor, kMaxHistory> tensors(size_t i) const {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(values[i], ""));
    if (!items) PyErr_Clear();
    check(static_cast<bool>(items), i, "a sequence of tensors", values[i]);
    c10::SmallVector<at::Tensor, kMaxHistory> tensors;
    for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(items.ptr()); ++j) {
      PyObject* const item = PySequence_Fast_GET_ITEM(items.ptr(), j);
      check(THPVariable_Check(item), i, "a sequence of tensors", item);
      tensors.push_back(THPVariable_Unpack(item));
    }
    return tensors;
  }
  Text text(size_t i) const {
    if (none(i)) return std::nullopt;
    Py_ssize_t size = 0;
    const char* const data = PyUnicode_Check(values[i]) ? PyUnicode_AsUTF8AndSize(values[i], &size) : nullptr;
    check(data != nullptr, i, "a string", values[i]);
    return c10::string_view(data, size);
  }
  // A tensor to be written, or a new one of the dtype given.
  MaybeTensor result(size_t i, const at::Tensor& x) const {
    if (!THPDtype_Check(values[i])) return maybe_tensor(i);
    return at::empty_like(x, x.options().dtype(reinterpret_cast<THPDtype*>(values[i])->scalar_type));
  }
};

// The op by the dispatcher, as torch.ops.pygen has it; `out` may be None.
PyObject* call_affine_step(PyObject*, PyObject* const* values, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 17, "affine_step: takes 17 arguments, got ", count);
  const Arguments a{values};
  const at::Tensor x = a.tensor(0);
  const auto history = a.tensors(6);
  const at::Tensor next = a.none(14) ? at::empty_like(x) : *a.result(14, x);
  const MaybeTensor pred = a.result(15, x), second = a.result(16, x);
  const auto call = [&](auto... others) {
    const py::gil_scoped_release no_gil;
    affine_step_op().call(x, others..., next, pred, second);
  };
  call(a.maybe_tensor(1), a.tensor(2), a.tensor(3), a.maybe_tensor(4), a.maybe_tensor(5), at::TensorList(history),
       a.maybe_tensor(7), a.maybe_tensor(8), a.text(9), a.maybe_tensor(10), a.maybe_tensor(11), a.maybe_tensor(12),
       a.maybe_tensor(13));
  return py::make_tuple(next, pred, second).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef affine_step_method = {
    "affine_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_affine_step)), METH_FASTCALL,
    "torch.ops.pygen.affine_step and its results, of which those given as a dtype are new."};

}  // namespace
}  // namespace pygen
