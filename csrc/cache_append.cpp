#include "pygen/cache_append.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "kv_cache.h"
#include "rope_table.h"

namespace pygen {
namespace {

constexpr const char* kOp = "cache_append";

// Every token that is no padding has a row of the table.
void check_positions(const CacheAppendArgs& args) {
  for (int64_t b = 0; b < args.cache.batch; ++b) {
    const int64_t length = kv_length(args.cache, b);
    if (args.positions.data == nullptr) {
      if (length > 0) check_position(kOp, args.rope, length - 1);
      continue;
    }
    for (int64_t t = std::max<int64_t>(0, args.length - length); t < args.length; ++t) {
      check_position(kOp, args.rope, args.positions.at(b, t));
    }
  }
}

[[maybe_unused]] void launch(const Cpu& cpu, const CacheAppendArgs& args) {
  const int64_t heads = args.q_heads + 2 * args.cache.kv_heads;
  const int64_t elements = std::min(args.length, kRopeTokens) * heads * args.cache.head_dim;
  cpu.run(cache_append, args, args.cache.batch * rope_units(args.length), (kMoveGrain + elements - 1) / elements);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const CacheAppendArgs& args) { gpu.run(cuda::cache_append, args); }
#endif

template <class Backend>
void cache_append_op(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
                     const at::Tensor& lengths, const std::optional<at::Tensor>& q,
                     const std::optional<at::Tensor>& rope, const std::optional<at::Tensor>& positions,
                     bool interleaved, const std::optional<at::Tensor>& q_norm, const std::optional<at::Tensor>& k_norm,
                     double eps, const std::optional<at::Tensor>& block_table, bool ring,
                     const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
                     const std::optional<at::Tensor>& out) {
  // Check and describe.
  const at::Device device = k_cache.device();
  CacheAppendArgs args{};
  args.k = head_operand(kOp, "k", k, device);
  args.v = head_operand(kOp, "v", v, device);
  TORCH_CHECK_VALUE(v.sizes() == k.sizes(), kOp, ": v must have k's shape ", k.sizes(), ", got ", v.sizes());
  args.length = k.size(2);
  args.cache = kv_cache(kOp, k.size(0), k_cache, v_cache, lengths, block_table, ring, k_scale, v_scale);
  TORCH_CHECK_VALUE(k.size(1) == args.cache.kv_heads && k.size(3) == args.cache.head_dim, kOp, ": k of shape ",
                    k.sizes(), " does not fit k_cache of shape ", k_cache.sizes());
  const auto check_dtype = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == k.scalar_type(), kOp, ": ", name, " must have k's dtype ", k.scalar_type(),
                     ", got ", tensor.scalar_type());
  };
  check_dtype("v", v);
  TORCH_CHECK_VALUE(q.has_value() == out.has_value(), kOp, ": give q and out together");
  TORCH_CHECK_VALUE(q.has_value() || !q_norm.has_value(), kOp, ": q_norm needs q");
  if (q.has_value()) {
    args.q = head_operand(kOp, "q", *q, device);
    args.out = head_operand(kOp, "out", *out, device);
    args.q_heads = q->size(1);
    TORCH_CHECK_VALUE(q->size(0) == k.size(0) && q->size(2) == k.size(2) && q->size(3) == k.size(3), kOp,
                      ": q must have k's shape ", k.sizes(), " but for its heads, got ", q->sizes());
    TORCH_CHECK_VALUE(out->sizes() == q->sizes(), kOp, ": out must have q's shape ", q->sizes(), ", got ",
                      out->sizes());
    check_dtype("q", *q);
    check_dtype("out", *out);
    at::assert_no_internal_overlap(*out);
    at::assert_no_partial_overlap(*out, *q);
  }
  at::assert_no_internal_overlap(k_cache);
  at::assert_no_internal_overlap(v_cache);
  args.q_norm = head_norm(kOp, "q_norm", q_norm, args.cache.head_dim, device);
  args.k_norm = head_norm(kOp, "k_norm", k_norm, args.cache.head_dim, device);
  check_eps(kOp, eps);
  args.eps = static_cast<float>(eps);
  TORCH_CHECK_VALUE(rope.has_value() || !positions.has_value(), kOp, ": positions needs rope");
  if (rope.has_value()) args.rope = rope_table(kOp, "rope", *rope, k.size(3), interleaved, device);
  if (positions.has_value()) args.positions = rope_positions(kOp, *positions, k.size(0), args.length, device);
  if (k.numel() == 0) return;
  if (Backend::host_can_read()) {
    check_kv_slots(kOp, args.cache, args.length);
    if (rope.has_value()) check_positions(args);
  } else {
    check_kv_slots_in_debug_mode(kOp, args.cache, lengths, block_table, args.length);
  }

  // Launch.
  launch(Backend(k), args);
}

PYGEN_OP("cache_append", cache_append_op,
         "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? q, Tensor? rope, "
         "Tensor? positions, bool interleaved, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? block_table, "
         "bool ring, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor(e!)? out) -> ()")

}  // namespace
}  // namespace pygen
