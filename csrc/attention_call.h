// What attention and its backward pass are given, checked and described.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "backend.h"
#include "planes.h"
#include "pygen/attention.h"
#include "tile_product.h"

namespace pygen {

class AttentionCall {
 public:
  AttentionCall(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& lengths, bool causal,
                std::optional<int64_t> window, std::optional<double> scale, double dropout_p,
                const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& step,
                const std::optional<at::Tensor>& sample_ids)
      : op_(op), q_(q) {
    // Check.
    for (const auto& [name, tensor] : {std::pair{"q", q}, {"k", k}, {"v", v}}) {
      TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": ", name, " must have shape (batch, heads, length, head_dim), got ",
                        tensor.sizes());
    }
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), head_dim = q.size(3);
    const int64_t kv_heads = k.size(1), keys = k.size(2);
    TORCH_CHECK_VALUE(head_dim >= 1 && head_dim <= kMostHeadDim, op, ": head_dim must be 1 to ", kMostHeadDim, ", got ",
                      head_dim);
    TORCH_CHECK_VALUE(kv_heads >= 1 && heads % kv_heads == 0, op, ": q has ", heads, " heads, not a multiple of k's ",
                      kv_heads);
    TORCH_CHECK_VALUE(!window.has_value() || *window >= 1, op, ": window must be positive, got ", *window);
    TORCH_CHECK_VALUE(!scale.has_value() || std::isfinite(*scale), op, ": scale must be finite, got ", *scale);
    TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must lie in [0, 1], got ", dropout_p);

    // Describe.
    args.batch = batch, args.heads = heads, args.kv_heads = kv_heads;
    args.queries = queries, args.keys = keys, args.head_dim = head_dim;
    args.q = rows("q", q, q.sizes());
    args.k = rows("k", k, {batch, kv_heads, keys, head_dim});
    args.v = rows("v", v, k.sizes());
    if (mask.has_value()) args.mask = mask_operand(*mask, {batch, heads, queries, keys});
    if (lengths.has_value()) {
      check_index(op, "lengths", *lengths, at::kLong, q.device());
      TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == batch, op, ": lengths must have shape (batch,) = (",
                        batch, ",), got ", lengths->sizes());
      args.lengths = lengths->const_data_ptr<int64_t>();
      args.lengths_stride = lengths->stride(0);
    }
    args.before = window.has_value() ? *window - 1 : kNoBand;
    args.after = causal ? 0 : args.before;
    args.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
    describe_dropout(static_cast<int32_t>(std::nearbyint(dropout_p * 65536.0)), seed, step, sample_ids);
    args.product = torch_tile_product();
  }

  // One more tensor of heads, in q's dtype.
  Operand rows(const char* name, const at::Tensor& tensor, at::IntArrayRef size) const {
    check_no_grad(op_, name, tensor);
    check_device(op_, name, tensor, q_.device());
    TORCH_CHECK_TYPE(tensor.scalar_type() == q_.scalar_type(), op_, ": ", name, " must have q's dtype ",
                     q_.scalar_type(), ", got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.sizes() == size, op_, ": ", name, " must have shape ", size, ", got ", tensor.sizes());
    return strided(name, tensor);
  }

  // A number for each query.
  float* of_queries(const char* name, const at::Tensor& tensor) const {
    check_device(op_, name, tensor, q_.device());
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op_, ": ", name, " must be float32, got ",
                     tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.sizes() == q_.sizes().slice(0, 3) && tensor.is_contiguous(), op_, ": ", name,
                      " must be contiguous, of shape ", q_.sizes().slice(0, 3), ", got ", tensor.sizes());
    return tensor.data_ptr<float>();
  }

  // Memory of the launches that are to come.
  at::Tensor memory(const Cpu& cpu, int64_t bytes) const {
    const at::Tensor held = at::empty({bytes}, q_.options().dtype(at::kByte));
    cpu.keep(held);
    return held;
  }

  AttentionArgs args{};

 private:
  // dropped: of 65536 weights.
  void describe_dropout(int32_t dropped, const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& step,
                        const std::optional<at::Tensor>& sample_ids) {
    if (dropped == 0) return;
    TORCH_CHECK_VALUE(seed.has_value(), op_, ": dropout needs a seed");
    TORCH_CHECK_VALUE(
        args.heads <= Dropout::kMostHeads && args.queries <= Dropout::kMostQueries && args.keys <= Dropout::kMostKeys,
        op_, ": dropout takes up to ", Dropout::kMostHeads, " heads, ", Dropout::kMostQueries, " queries and ",
        Dropout::kMostKeys, " keys, got ", args.heads, ", ", args.queries, " and ", args.keys);
    args.dropout.philox = philox_settings(op_, seed, step, sample_ids, args.batch, q_.device());
    args.dropout.last = static_cast<uint16_t>(dropped - 1);
    args.dropout.scale = dropped < 65536 ? 65536.0f / static_cast<float>(65536 - dropped) : 0.0f;
  }

  Operand strided(const char* name, const at::Tensor& tensor, bool allow_bool = false) const {
    Operand operand{tensor.data_ptr(), {}, kernel_dtype(op_, name, tensor, allow_bool)};
    for (int d = 0; d < 4; ++d) operand.stride[d] = tensor.stride(d);
    return operand;
  }

  Operand mask_operand(const at::Tensor& mask, at::IntArrayRef size) const {
    check_no_grad(op_, "mask", mask);
    check_device(op_, "mask", mask, q_.device());
    const at::ScalarType type = mask.scalar_type();
    TORCH_CHECK_TYPE(type == at::kBool || type == at::kFloat || type == q_.scalar_type(), op_,
                     ": mask must be bool, float32 or of q's dtype ", q_.scalar_type(), ", got ", type);
    TORCH_CHECK_VALUE(at::is_expandable_to(mask.sizes(), size), op_, ": mask of shape ", mask.sizes(),
                      " does not broadcast to ", size);
    return strided("mask", mask.expand(size), /*allow_bool=*/true);
  }

  const char* op_;
  const at::Tensor& q_;
};

}  // namespace pygen
