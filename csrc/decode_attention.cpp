#include "pygen/decode_attention.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include <cmath>

#include "backend.h"
#include "kv_cache.h"

namespace pygen {
namespace {

constexpr const char* kOp = "decode_attention";

// One number per head.
const float* per_head(const char* name, const std::optional<at::Tensor>& tensor, const at::Tensor& q, int64_t& stride) {
  if (!tensor.has_value()) return nullptr;
  check_index(kOp, name, *tensor, at::kFloat, q.device());
  check_no_grad(kOp, name, *tensor);
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == q.size(1), kOp, ": ", name,
                    " must have shape (heads,) = (", q.size(1), ",), got ", tensor->sizes());
  stride = tensor->stride(0);
  return tensor->const_data_ptr<float>();
}

Operand query_operand(const char* name, const at::Tensor& tensor) {
  check_no_grad(kOp, name, tensor);
  Operand operand{tensor.data_ptr(), {}, kernel_dtype(kOp, name, tensor)};
  for (int d = 0; d < 4; ++d) operand.stride[d] = tensor.stride(d);
  return operand;
}

[[maybe_unused]] void launch(const Cpu& cpu, const DecodeAttentionArgs& args) {
  if (Cpu::host_can_read()) check_kv_slots(kOp, args.cache, args.window + args.q_len - 1);
  const auto grain = [&](int64_t elements) { return std::max<int64_t>(1, kMoveGrain / elements); };
  cpu.run(decode_attention, args, [args] { return work_items(args); }, grain(2 * kSplitKeys * args.cache.head_dim));
  const int64_t rows = args.cache.batch * args.cache.kv_heads * args.group * args.q_len;
  cpu.run(decode_attention_merge, args, rows, grain(args.splits * args.cache.head_dim));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const DecodeAttentionArgs& args) { gpu.run(cuda::decode_attention, args); }
#endif

template <class Backend>
void decode_attention_op(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                         const at::Tensor& lengths, const std::optional<at::Tensor>& block_table, bool ring,
                         std::optional<int64_t> window, std::optional<double> scale, std::optional<double> soft_cap,
                         const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& sinks,
                         const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
                         const at::Tensor& out, const std::optional<at::Tensor>& lse) {
  // Check.
  TORCH_CHECK_VALUE(q.dim() == 4, kOp, ": q must have shape (batch, heads, q_len, head_dim), got ", q.sizes());
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), head_dim = q.size(3);
  DecodeAttentionArgs args{};
  args.cache = kv_cache(kOp, batch, k_cache, v_cache, lengths, block_table, ring, k_scale, v_scale);
  check_device(kOp, "q", q, k_cache.device());
  TORCH_CHECK_VALUE(head_dim == args.cache.head_dim, kOp, ": q has a head_dim of ", head_dim, ", and k_cache one of ",
                    args.cache.head_dim);
  TORCH_CHECK_VALUE(head_dim >= 1 && head_dim <= kMaxHeadDim, kOp, ": head_dim must be 1 to ", kMaxHeadDim, ", got ",
                    head_dim);
  TORCH_CHECK_VALUE(q_len >= 1 && q_len <= kMaxQueries, kOp, ": q_len must be 1 to ", kMaxQueries, ", got ", q_len);
  TORCH_CHECK_VALUE(args.cache.kv_heads >= 1 && heads >= 1 && heads % args.cache.kv_heads == 0, kOp, ": q has ", heads,
                    " heads, not a multiple of k_cache's ", args.cache.kv_heads);
  TORCH_CHECK_VALUE(!window.has_value() || *window >= 1, kOp, ": window must be positive, got ", *window);
  TORCH_CHECK_VALUE(!scale.has_value() || std::isfinite(*scale), kOp, ": scale must be finite, got ", *scale);
  TORCH_CHECK_VALUE(!soft_cap.has_value() || *soft_cap > 0.0, kOp, ": soft_cap must be positive, got ", *soft_cap);
  TORCH_CHECK_VALUE(out.sizes() == q.sizes(), kOp, ": out must have q's shape ", q.sizes(), ", got ", out.sizes());
  check_device(kOp, "out", out, q.device());
  at::assert_no_internal_overlap(out);
  for (const at::Tensor* tensor : {&q, &k_cache, &v_cache}) at::assert_no_overlap(out, *tensor);

  // Describe.
  args.group = heads / args.cache.kv_heads;
  args.q_len = q_len;
  args.q = query_operand("q", q);
  args.out = query_operand("out", out);
  if (lse.has_value()) {
    check_index(kOp, "lse", *lse, at::kFloat, q.device());
    TORCH_CHECK_VALUE(lse->sizes() == q.sizes().slice(0, 3), kOp, ": lse must have shape ", q.sizes().slice(0, 3),
                      ", got ", lse->sizes());
    at::assert_no_internal_overlap(*lse);
    args.lse = lse->data_ptr<float>();
    for (int d = 0; d < 3; ++d) args.lse_stride[d] = lse->stride(d);
  }
  const int64_t capacity = args.cache.max_pages * args.cache.page_size;
  args.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
  args.soft_cap = static_cast<float>(soft_cap.value_or(0.0));
  args.window = std::min(window.value_or(kNoWindow), kNoWindow);
  args.alibi_slopes = per_head("alibi_slopes", alibi_slopes, q, args.alibi_stride);
  args.sinks = per_head("sinks", sinks, q, args.sinks_stride);
  if (out.numel() == 0) return;
  if constexpr (!std::is_same_v<Backend, Cpu>) {
    check_kv_slots_in_debug_mode(kOp, args.cache, lengths, block_table, args.window + q_len - 1);
  }

  // Choose. Keys that lie in a row touch one split more than they would fill.
  args.splits = (std::min(capacity, args.window + q_len - 1) + kSplitKeys - 2) / kSplitKeys + 1;
  const int64_t rows = batch * heads * q_len * args.splits, padded = padded_dim(args);
  const at::Tensor workspace = at::empty({rows * (padded + 2)}, q.options().dtype(at::kFloat));
  args.partials = workspace.data_ptr<float>();
  args.statistics = args.partials + rows * padded;

  // Launch.
  const Backend backend(q);
  backend.keep(workspace);
  launch(backend, args);
}

PYGEN_OP("decode_attention", decode_attention_op,
         "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, bool ring, int? window, "
         "float? scale, float? soft_cap, Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, "
         "Tensor(a!) out, Tensor(b!)? lse) -> ()")

}  // namespace
}  // namespace pygen
