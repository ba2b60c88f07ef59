#include "pygen/linear_decode.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "backend.h"
#include "operands.h"
#include "tile_product.h"

namespace pygen {
namespace {

constexpr const char* kOp = "linear_decode";
constexpr std::string_view kFormats[] = {"float32", "bfloat16", "int8", "int4"};
constexpr std::string_view kNorms[] = {"none", "rms", "layer"};
constexpr std::string_view kActivations[] = {"silu", "gelu", "gelu_tanh", "none"};  // Activation's, and none
// Bytes of weights a thread takes at the least.
constexpr int64_t kWeightGrain = 128 << 10;

using Optional = std::optional<at::Tensor>;

template <class Enum, size_t kCount>
Enum named(const char* argument, std::string_view value, const std::string_view (&names)[kCount]) {
  const auto* const known = std::find(names, names + kCount, value);
  TORCH_CHECK_VALUE(known != names + kCount, kOp, ": ", argument, " must be one of ",
                    c10::Join(", ", at::ArrayRef<std::string_view>(names)), ", got ", value);
  return static_cast<Enum>(known - names);
}

Operand matrix(const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns, const at::Tensor& x,
               bool allow_float = false) {
  check_no_grad(kOp, name, tensor);
  check_device(kOp, name, tensor, x.device());
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, kOp, ": ", name,
                    " must have shape (", rows, ", ", columns, "), got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type() || (allow_float && tensor.scalar_type() == at::kFloat), kOp,
                   ": ", name, " must have x's dtype ", x.scalar_type(), allow_float ? " or be float32" : "", ", got ",
                   tensor.scalar_type());
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1)}, kernel_dtype(kOp, name, tensor)};
}

Operand vector(const char* name, const Optional& tensor, int64_t count, const at::Tensor& x) {
  if (!tensor.has_value()) return {};
  check_no_grad(kOp, name, *tensor);
  check_device(kOp, name, *tensor, x.device());
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == count, kOp, ": ", name, " must have shape (", count,
                    ",), got ", tensor->sizes());
  TORCH_CHECK_TYPE(tensor->scalar_type() == x.scalar_type() || tensor->scalar_type() == at::kFloat, kOp, ": ", name,
                   " must have x's dtype ", x.scalar_type(), " or be float32, got ", tensor->scalar_type());
  return {tensor->data_ptr(), {tensor->stride(0)}, kernel_dtype(kOp, name, *tensor)};
}

PackedLinear packed(const at::Tensor& data, int64_t outputs, int64_t inputs, std::string_view format, int64_t group,
                    bool zeros, bool gated, bool stacked, const at::Tensor& x) {
  check_index(kOp, "weight", data, at::kByte, x.device());
  PackedLinear weight{data.const_data_ptr(),
                      outputs,
                      inputs,
                      named<WeightFormat>("the weight's format", format, kFormats),
                      gated,
                      zeros,
                      group};
  const bool grouped = group == 32 || group == 64 || group == 128 || (group >= inputs && group % 8 == 0);
  TORCH_CHECK_VALUE(outputs >= 0 && inputs >= 1 && (weight.quantised() ? grouped : group == 0), kOp,
                    ": weight is not as pack_linear makes it");
  TORCH_CHECK_VALUE((data.dim() == 3) == stacked, kOp, ": experts and a weight of pack_experts go together");
  TORCH_CHECK_VALUE(data.dim() == 2 + stacked && data.is_contiguous() && data.size(-2) == weight.panels() &&
                        data.size(-1) == weight.panel_bytes() && reinterpret_cast<uintptr_t>(weight.data) % 64 == 0,
                    kOp, ": weight must hold ", weight.panels(), " panels of ", weight.panel_bytes(),
                    " bytes, aligned to 64, got ", data.sizes());
  return weight;
}

// Of each row of x, those of all its choices: int64 (rows, choices).
void add_experts(LinearDecodeArgs& args, const at::Tensor& experts, const at::Tensor& data, const at::Tensor& x) {
  check_index(kOp, "experts", experts, at::kLong, x.device());
  TORCH_CHECK_VALUE(experts.dim() == 2 && experts.is_contiguous(), kOp,
                    ": experts must have shape (..., choices) and be contiguous, got ", experts.sizes(),
                    " with strides ", experts.strides());
  args.rows = experts.numel();
  args.expert_count = data.size(0);
  TORCH_CHECK_VALUE(args.expert_count >= 1, kOp, ": weight must hold an expert");
  TORCH_CHECK_VALUE(x.size(0) == experts.size(0) || x.size(0) == args.rows, kOp, ": x of shape ", x.sizes(),
                    " does not fit experts of shape ", experts.sizes());
  args.choices = args.rows / std::max<int64_t>(1, x.size(0));
  args.experts = experts.const_data_ptr<int64_t>();
}

void check_experts(const LinearDecodeArgs& args) {
  for (int64_t row = 0; args.experts != nullptr && row < args.rows; ++row) {
    TORCH_CHECK_INDEX(args.experts[row] >= 0 && args.experts[row] < args.expert_count, kOp, ": expert ",
                      args.experts[row], " is none of the weight's ", args.expert_count);
  }
}

at::Tensor reserve_scratch(LinearDecodeArgs& args, int64_t bytes, const at::Tensor& x) {
  at::Tensor scratch = at::empty({bytes}, x.options().dtype(at::kByte));
  args.scratch = static_cast<char*>(scratch.data_ptr());
  return scratch;
}

[[maybe_unused]] void launch(const Cpu& cpu, LinearDecodeArgs& args, const at::Tensor& x, bool blocked) {
  const bool pairs = args.weight.format == WeightFormat::kBFloat16 && args.x.dtype == DType::kBFloat16;
  if (blocked && pairs && args.experts == nullptr) args.product = torch_tile_product();
  const at::Tensor scratch = reserve_scratch(args, linear_decode_scratch(args), x);
  cpu.keep(scratch);
  cpu.run(linear_decode_rows, args, linear_decode_rows_made(args),
          std::max<int64_t>(1, kMoveGrain / args.weight.inputs));
  const int64_t panels = args.weight.panels(), grain = std::max<int64_t>(1, kWeightGrain / args.weight.panel_bytes());
  if (args.experts == nullptr) return cpu.run(linear_decode, args, panels, grain);
  cpu.run(linear_decode_experts, args, 1, 1);
  cpu.run(linear_decode, args, [used = ExpertRows(args).used, panels] { return *used * panels; }, grain);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, LinearDecodeArgs& args, const at::Tensor& x, bool) {
  const at::Tensor scratch = reserve_scratch(args, cuda::linear_decode_workspace(args), x);
  gpu.run(cuda::linear_decode, args);
}
#endif

template <class Backend>
void linear_decode_op(const at::Tensor& x, const at::Tensor& weight, int64_t outputs, int64_t inputs,
                      std::string_view format, int64_t group, bool zeros, bool gated, const Optional& bias,
                      const Optional& residual, std::string_view activation, std::string_view norm,
                      const Optional& norm_weight, const Optional& norm_bias, double eps,
                      std::optional<double> soft_cap, const Optional& experts, bool blocked, const at::Tensor& out) {
  // Check and describe.
  TORCH_CHECK_VALUE(x.dim() == 2, kOp, ": x must have shape (rows, inputs), got ", x.sizes());
  LinearDecodeArgs args{};
  args.rows = x.size(0), args.choices = 1;
  args.x = matrix("x", x, x.size(0), inputs, x);
  args.weight = packed(weight, outputs, inputs, format, group, zeros, gated, experts.has_value(), x);
  if (experts.has_value()) add_experts(args, *experts, weight, x);
  args.out = matrix("out", out, args.rows, outputs, x, /*allow_float=*/true);
  if (residual.has_value()) args.residual = matrix("residual", *residual, args.rows, outputs, x);
  TORCH_CHECK_VALUE(!(bias.has_value() && experts.has_value()), kOp, ": bias is for a layer without experts");
  args.bias = vector("bias", bias, outputs * (1 + gated), x);
  args.norm = named<LinearNorm>("norm", norm, kNorms);
  args.activated = activation != "none";
  args.activation = named<Activation>("activation", activation, kActivations);
  args.norm_weight = vector("norm_weight", norm_weight, inputs, x);
  args.norm_bias = vector("norm_bias", norm_bias, inputs, x);
  TORCH_CHECK_VALUE(args.norm != LinearNorm::kNone || !(norm_weight.has_value() || norm_bias.has_value()), kOp,
                    ": norm_weight and norm_bias are for a norm, which is \"none\"");
  check_eps(kOp, eps);
  args.eps = eps;
  TORCH_CHECK_VALUE(!soft_cap.has_value() || *soft_cap > 0.0, kOp, ": soft_cap must be positive, got ", *soft_cap);
  TORCH_CHECK_VALUE(!soft_cap.has_value() || !(args.activated || gated), kOp,
                    ": soft_cap is for a layer without activation and gate");
  args.soft_cap = static_cast<float>(soft_cap.value_or(0.0));
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, x);
  if (residual.has_value()) at::assert_no_partial_overlap(out, *residual);
  if (args.rows == 0 || outputs == 0) return;
  if (Backend::host_can_read()) check_experts(args);

  // Launch.
  launch(Backend(x), args, x, blocked);
}

PYGEN_OP("linear_decode", linear_decode_op,
         "(Tensor x, Tensor weight, SymInt outputs, SymInt inputs, str format, SymInt group, bool zeros, "
         "bool gated, Tensor? bias, Tensor? residual, str activation, str norm, Tensor? norm_weight, "
         "Tensor? norm_bias, float eps, float? soft_cap, Tensor? experts, bool blocked, "
         "Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
