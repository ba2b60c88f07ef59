#include "pygen/attention.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "backend.h"
#include "operands.h"
#include "tile_product.h"

namespace pygen {
namespace {

constexpr const char* kOp = "attention";

Operand rows(const char* name, const at::Tensor& tensor, const at::Tensor& q, at::IntArrayRef size) {
  check_no_grad(kOp, name, tensor);
  check_device(kOp, name, tensor, q.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == q.scalar_type(), kOp, ": ", name, " must have q's dtype ", q.scalar_type(),
                   ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == size, kOp, ": ", name, " must have shape ", size, ", got ", tensor.sizes());
  Operand operand{tensor.data_ptr(), {}, kernel_dtype(kOp, name, tensor)};
  for (int d = 0; d < 4; ++d) operand.stride[d] = tensor.stride(d);
  return operand;
}

Operand mask_operand(const at::Tensor& mask, const at::Tensor& q, at::IntArrayRef size) {
  check_no_grad(kOp, "mask", mask);
  check_device(kOp, "mask", mask, q.device());
  const at::ScalarType type = mask.scalar_type();
  TORCH_CHECK_TYPE(type == at::kBool || type == at::kFloat || type == q.scalar_type(), kOp,
                   ": mask must be bool, float32 or of q's dtype ", q.scalar_type(), ", got ", type);
  TORCH_CHECK_VALUE(at::is_expandable_to(mask.sizes(), size), kOp, ": mask of shape ", mask.sizes(),
                    " does not broadcast to ", size);
  const at::Tensor whole = mask.expand(size);
  Operand operand{whole.data_ptr(), {}, kernel_dtype(kOp, "mask", whole, /*allow_bool=*/true)};
  for (int d = 0; d < 4; ++d) operand.stride[d] = whole.stride(d);
  return operand;
}

void attention_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
                  const std::optional<at::Tensor>& lengths, bool causal, std::optional<int64_t> window,
                  std::optional<double> scale, const at::Tensor& out) {
  // Check.
  for (const auto& [name, tensor] : {std::pair{"q", q}, {"k", k}, {"v", v}}) {
    TORCH_CHECK_VALUE(tensor.dim() == 4, kOp, ": ", name, " must have shape (batch, heads, length, head_dim), got ",
                      tensor.sizes());
  }
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k.size(1), keys = k.size(2);
  TORCH_CHECK_VALUE(head_dim >= 1 && head_dim <= kMostHeadDim, kOp, ": head_dim must be 1 to ", kMostHeadDim, ", got ",
                    head_dim);
  TORCH_CHECK_VALUE(kv_heads >= 1 && heads % kv_heads == 0, kOp, ": q has ", heads, " heads, not a multiple of k's ",
                    kv_heads);
  TORCH_CHECK_VALUE(!window.has_value() || *window >= 1, kOp, ": window must be positive, got ", *window);
  TORCH_CHECK_VALUE(!scale.has_value() || std::isfinite(*scale), kOp, ": scale must be finite, got ", *scale);

  // Describe.
  AttentionArgs args{};
  args.batch = batch, args.heads = heads, args.kv_heads = kv_heads;
  args.queries = queries, args.keys = keys, args.head_dim = head_dim;
  args.q = rows("q", q, q, q.sizes());
  args.k = rows("k", k, q, {batch, kv_heads, keys, head_dim});
  args.v = rows("v", v, q, {batch, kv_heads, keys, head_dim});
  args.out = rows("out", out, q, q.sizes());
  if (mask.has_value()) args.mask = mask_operand(*mask, q, {batch, heads, queries, keys});
  if (lengths.has_value()) {
    check_index(kOp, "lengths", *lengths, at::kLong, q.device());
    TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == batch, kOp, ": lengths must have shape (batch,) = (",
                      batch, ",), got ", lengths->sizes());
    args.lengths = lengths->const_data_ptr<int64_t>();
    args.lengths_stride = lengths->stride(0);
  }
  args.before = window.has_value() ? *window - 1 : kNoBand;
  args.after = causal ? 0 : args.before;
  args.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
  at::assert_no_internal_overlap(out);
  for (const at::Tensor& tensor : {q, k, v}) at::assert_no_overlap(out, tensor);
  if (out.numel() == 0) return;

  // Choose and launch.
  args.product = torch_tile_product();
  const AttentionLayout layout(args);
  const at::Tensor packed = at::empty({layout.bytes}, q.options().dtype(at::kByte));
  args.packed = static_cast<char*>(packed.data_ptr());
  const Cpu cpu(q);
  cpu.keep(packed);
  cpu.run(attention_pack, args, batch * kv_heads * layout.blocks, 1);
  const int64_t tiles = (queries + AttentionLayout::kQueries - 1) / AttentionLayout::kQueries;
  cpu.run(attention, args, batch * heads * tiles, 1);
}

PYGEN_CPU_OP("attention", attention_op,
             "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? lengths, bool causal, SymInt? window, float? scale, "
             "Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
