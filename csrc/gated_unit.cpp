#include "pygen/gated_unit.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

constexpr const char* kOp = "gated_unit";

Activation activation_of(c10::string_view name) {
  for (size_t i = 0; i < std::size(kActivationNames); ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK_VALUE(false, kOp, ": activation must be silu, gelu or gelu_tanh, got ", name);
}

[[maybe_unused]] void gated_unit_cpu(const at::Tensor& gate, const at::Tensor& up, c10::string_view activation,
                                     const std::optional<at::Tensor>& grad, const std::optional<at::Tensor>& out,
                                     const std::optional<at::Tensor>& grad_gate,
                                     const std::optional<at::Tensor>& grad_up) {
  GatedUnitArgs args{};
  struct Given {
    const char* name;
    const at::Tensor* tensor;
    Operand* operand;
  };
  const auto given = [](const std::optional<at::Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; };
  const Given inputs[] = {{"gate", &gate, &args.gate}, {"up", &up, &args.up}, {"grad", given(grad), &args.grad}};
  const Given outputs[] = {{"out", given(out), &args.out},
                           {"grad_gate", given(grad_gate), &args.grad_gate},
                           {"grad_up", given(grad_up), &args.grad_up}};

  // Check.
  args.activation = activation_of(activation);
  const DType dtype = kernel_dtype(kOp, "gate", gate);
  const auto check = [&](const char* name, const at::Tensor& tensor) {
    check_no_grad(kOp, name, tensor);
    check_device(kOp, name, tensor, gate.device());
    TORCH_CHECK_VALUE(tensor.sizes() == gate.sizes(), kOp, ": ", name, " must have gate's shape ", gate.sizes(),
                      ", got ", tensor.sizes());
    TORCH_CHECK_TYPE(tensor.scalar_type() == gate.scalar_type(), kOp, ": ", name, " must have gate's dtype ",
                     gate.scalar_type(), ", got ", tensor.scalar_type());
  };
  for (const Given& input : inputs) {
    if (input.tensor != nullptr) check(input.name, *input.tensor);
  }
  TORCH_CHECK_VALUE(grad.has_value() || !(grad_gate.has_value() || grad_up.has_value()), kOp,
                    ": grad_gate and grad_up need grad, the gradient of out");
  // An output may be exactly one of the inputs, never a part of one, and never another output.
  for (const Given& output : outputs) {
    if (output.tensor == nullptr) continue;
    check(output.name, *output.tensor);
    at::assert_no_internal_overlap(*output.tensor);
    for (const Given& input : inputs) {
      if (input.tensor != nullptr) at::assert_no_partial_overlap(*output.tensor, *input.tensor);
    }
    for (const Given* other = outputs; other != &output; ++other) {
      if (other->tensor != nullptr) at::assert_no_overlap(*output.tensor, *other->tensor);
    }
  }
  if (gate.numel() == 0) return;

  // Describe.
  c10::SmallVector<int64_t, kMaxDims> dims;
  for (int64_t d = 0; d < gate.dim(); ++d) dims.push_back(d);
  IterationSpace space(gate.sizes(), dims, /*leading=*/0, /*keep_order=*/false);
  for (const auto& some : {inputs, outputs}) {
    for (const Given* one = some; one != some + 3; ++one) {
      if (one->tensor != nullptr) space.add(*one->operand, dtype, *one->tensor);
    }
  }
  args.ndim = space.finish(kOp, args.size);

  // Launch.
  Cpu(gate).run_elements(gated_unit, args, gate.numel(), kMoveGrain);
}

PYGEN_CPU_OP("gated_unit", gated_unit_cpu,
             "(Tensor gate, Tensor up, str activation, Tensor? grad, Tensor(a!)? out, Tensor(b!)? grad_gate, "
             "Tensor(c!)? grad_up) -> ()")

}  // namespace
}  // namespace pygen
