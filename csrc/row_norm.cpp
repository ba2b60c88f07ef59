#include "pygen/row_norm.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Collects tensors of x's shape and dtype, and parameters, of all rows or of each sample's.
class Rows {
 public:
  Rows(const char* op, RowNormRows& rows, const at::Tensor& x, double eps, double offset, bool centred,
       std::initializer_list<const OptionalTensor*> parameters)
      : op_(op),
        rows_(rows),
        x_(x),
        by_sample_(
            std::any_of(parameters.begin(), parameters.end(),
                        [](const auto* parameter) { return parameter->has_value() && (*parameter)->dim() == 2; })),
        space_(x.sizes(), leading_dims(op, x), by_sample_ ? 1 : 0, false) {
    TORCH_CHECK_VALUE(!by_sample_ || x.dim() >= 2, op,
                      ": x must have shape (batch, ..., elements) where a parameter is (batch, elements), got ",
                      x.sizes());
    check_eps(op, eps);
    rows.centred = centred;
    rows.eps = eps;
    rows.offset = static_cast<float>(offset);
    rows.elements = x.size(-1);
  }

  void add(Operand& operand, const char* name, const OptionalTensor& tensor) {
    if (!tensor.has_value()) return;
    check_grad(name, *tensor);
    const DType dtype = kernel_dtype(op_, name, *tensor);
    TORCH_CHECK_VALUE(tensor->sizes() == x_.sizes(), op_, ": ", name, " must have x's shape ", x_.sizes(), ", got ",
                      tensor->sizes());
    TORCH_CHECK_TYPE(tensor->scalar_type() == x_.scalar_type(), op_, ": ", name, " must have x's dtype ",
                     x_.scalar_type(), ", got ", tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->stride(-1) == 1 || tensor->size(-1) <= 1 || tensor->numel() == 0, op_, ": ", name,
                      "'s last dimension must be contiguous, call contiguous() on it; got strides ", tensor->strides());
    space_.add(operand, dtype, *tensor);
  }

  void add_output(Operand& operand, const char* name, const OptionalTensor& tensor) {
    if (!tensor.has_value()) return;
    at::assert_no_internal_overlap(*tensor);
    add(operand, name, tensor);
  }

  void add_parameter(Operand& operand, const char* name, const OptionalTensor& tensor) {
    if (!tensor.has_value()) return;
    check_grad(name, *tensor);
    const bool of_sample = tensor->dim() == 2;
    const int64_t of_all[] = {rows_.elements}, of_samples[] = {x_.size(0), rows_.elements};
    TORCH_CHECK_VALUE(tensor->sizes() == (of_sample ? at::IntArrayRef(of_samples) : of_all), op_, ": ", name,
                      " must have shape (", rows_.elements, ",), or (", x_.size(0), ", ", rows_.elements,
                      ") if it differs by sample, got ", tensor->sizes());
    TORCH_CHECK_TYPE(tensor->scalar_type() == x_.scalar_type() || tensor->scalar_type() == at::kFloat, op_, ": ", name,
                     " must have x's dtype ", x_.scalar_type(), " or be float32, got ", tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->stride(-1) == 1 || tensor->size(-1) <= 1 || tensor->numel() == 0, op_, ": ", name,
                      "'s last dimension must be contiguous, call contiguous() on it; got strides ", tensor->strides());
    operand.data = tensor->data_ptr();
    operand.dtype = kernel_dtype(op_, name, *tensor);
    operand.stride[0] = of_sample ? tensor->stride(0) : 0;
  }

  // One that goes by sample where the weight does.
  void add_parameter(Operand& operand, const char* name, const OptionalTensor& tensor, const OptionalTensor& weight) {
    if (!tensor.has_value()) return;
    const int64_t dim = weight.has_value() ? weight->dim() : 1;
    TORCH_CHECK_VALUE(tensor->dim() == dim, op_, ": ", name, " must have as many dimensions as weight, or one, got ",
                      tensor->sizes());
    add_parameter(operand, name, tensor);
  }

  // How many have parameters of their own.
  int64_t samples() const { return by_sample_ ? x_.size(0) : 1; }

  // The number of rows.
  int64_t finish() {
    rows_.ndim = space_.finish(op_, rows_.size);
    const int64_t count = x_.numel() / std::max<int64_t>(1, rows_.elements);
    rows_.per_sample = count / std::max<int64_t>(1, samples());
    return count;
  }

 private:
  void check_grad(const char* name, const at::Tensor& tensor) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && tensor.requires_grad()), op_, ": ", name,
                " requires grad, and what is written to given tensors is not recorded: leave out and residual_out out, "
                "or call it under torch.no_grad()");
  }

  static c10::SmallVector<int64_t, kMaxDims> leading_dims(const char* op, const at::Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have shape (..., elements), got ", x.sizes());
    c10::SmallVector<int64_t, kMaxDims> dims;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) dims.push_back(d);
    return dims;
  }

  const char* op_;
  RowNormRows& rows_;
  const at::Tensor& x_;
  bool by_sample_;
  IterationSpace space_;
};

// An output may be the very tensor that is read, element by element.
void check_overlap(const at::Tensor& out, std::initializer_list<OptionalTensor> by_element,
                   std::initializer_list<OptionalTensor> others) {
  for (const OptionalTensor& tensor : by_element) {
    if (tensor.has_value()) at::assert_no_partial_overlap(out, *tensor);
  }
  for (const OptionalTensor& tensor : others) {
    if (tensor.has_value()) at::assert_no_overlap(out, *tensor);
  }
}

[[maybe_unused]] void row_norm_cpu(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& gate,
                                   const OptionalTensor& weight, const OptionalTensor& bias, double eps, double offset,
                                   bool centred, const at::Tensor& out, const OptionalTensor& residual_out) {
  // Check and describe.
  const char* op = centred ? "layer_norm" : "rms_norm";
  TORCH_CHECK_VALUE(residual.has_value() == residual_out.has_value(), op,
                    ": residual_out receives x + residual: give both or neither");
  TORCH_CHECK_VALUE(!gate.has_value() || residual.has_value(), op, ": gate needs a residual that gate * x is added to");
  RowNormArgs args{};
  Rows rows(op, args.rows, x, eps, offset, centred, {&gate, &weight, &bias});
  rows.add(args.x, "x", x);
  rows.add(args.residual, "residual", residual);
  rows.add_output(args.out, "out", out);
  rows.add_output(args.residual_out, "residual_out", residual_out);
  rows.add_parameter(args.gate, "gate", gate);
  rows.add_parameter(args.rows.weight, "weight", weight);
  rows.add_parameter(args.bias, "bias", bias, weight);
  check_overlap(out, {x, residual}, {residual_out, gate, weight, bias});
  if (residual_out.has_value()) check_overlap(*residual_out, {x, residual}, {gate, weight, bias});
  if (x.numel() == 0) return;
  const int64_t count = rows.finish();
  args.stream = static_cast<int64_t>(out.nbytes()) >= kStreamBytes;

  // Launch.
  Cpu(x).run(row_norm, args, count, std::max<int64_t>(1, kMoveGrain / args.rows.elements));
}

[[maybe_unused]] void row_norm_backward_cpu(const at::Tensor& x, const at::Tensor& grad, const OptionalTensor& weight,
                                            double eps, double offset, bool centred,
                                            const OptionalTensor& residual_grad, const OptionalTensor& grad_x,
                                            const OptionalTensor& grad_weight, const OptionalTensor& grad_bias) {
  // Check and describe.
  const char* op = centred ? "layer_norm's backward pass" : "rms_norm's backward pass";
  RowNormBackwardArgs args{};
  Rows rows(op, args.rows, x, eps, offset, centred, {&weight, &grad_weight, &grad_bias});
  rows.add(args.x, "x", x);
  rows.add(args.grad, "grad", grad);
  rows.add(args.residual_grad, "residual_grad", residual_grad);
  rows.add_output(args.grad_x, "grad_x", grad_x);
  rows.add_parameter(args.rows.weight, "weight", weight);
  rows.add_parameter(args.grad_weight, "grad_weight", grad_weight, weight);
  rows.add_parameter(args.grad_bias, "grad_bias", grad_bias, weight);
  if (grad_x.has_value()) check_overlap(*grad_x, {x, grad, residual_grad}, {weight, grad_weight, grad_bias});
  for (const auto* wanted : {&grad_weight, &grad_bias}) {
    TORCH_CHECK_VALUE(!wanted->has_value() || (*wanted)->is_contiguous(), op, ": ",
                      wanted == &grad_bias ? "grad_bias" : "grad_weight", " must be contiguous");
  }
  rows.finish();
  args.samples = rows.samples();
  args.chunks = (args.rows.per_sample + kRowNormChunk - 1) / kRowNormChunk;
  const auto sums = [&](const OptionalTensor& wanted) {
    const int64_t chunks = wanted.has_value() ? args.samples * args.chunks : 0;
    return at::empty({chunks, args.rows.elements}, x.options().dtype(at::kFloat));
  };
  const at::Tensor weight_sums = sums(grad_weight), bias_sums = sums(grad_bias);
  if (grad_weight.has_value()) args.weight_sums = weight_sums.data_ptr<float>();
  if (grad_bias.has_value()) args.bias_sums = bias_sums.data_ptr<float>();

  // Launch.
  const Cpu cpu(x);
  cpu.keep(weight_sums), cpu.keep(bias_sums);
  const int64_t elements = std::max<int64_t>(1, args.rows.elements * kRowNormChunk);
  cpu.run(row_norm_backward, args, args.samples * args.chunks, std::max<int64_t>(1, kMoveGrain / elements));
  if (grad_weight.has_value() || grad_bias.has_value()) {
    cpu.run_elements(row_norm_gradients, args, args.samples * args.rows.elements,
                     std::max<int64_t>(1024, kMoveGrain / std::max<int64_t>(1, args.chunks)));
  }
}

PYGEN_CPU_OP(
    "row_norm", row_norm_cpu,
    "(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, float eps, float offset, bool centred, "
    "Tensor(a!) out, Tensor(b!)? residual_out) -> ()")
PYGEN_CPU_OP("row_norm_backward", row_norm_backward_cpu,
             "(Tensor x, Tensor grad, Tensor? weight, float eps, float offset, bool centred, Tensor? residual_grad, "
             "Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()")

}  // namespace
}  // namespace pygen
