// From tensors to the cache of keys and values that kernels see.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <string_view>

#include "operands.h"
#include "pygen/kv_cache.h"

namespace pygen {

inline KvTensor kv_tensor(const char* op, const char* name, const at::Tensor& tensor, const char* scale_name,
                          const std::optional<at::Tensor>& scale) {
  check_no_grad(op, name, tensor);
  TORCH_CHECK_VALUE(tensor.stride(3) == 1 || tensor.size(3) <= 1, op, ": ", name,
                    " must be contiguous in head_dim, got strides ", tensor.strides());
  KvTensor kv{};
  kv.data = tensor.data_ptr();
  for (int d = 0; d < 3; ++d) kv.stride[d] = tensor.stride(d);
  kv.dtype = kernel_dtype(op, name, tensor, /*allow_bool=*/false, /*allow_int8=*/true);
  const bool quantised = kv.dtype == DType::kInt8;
  TORCH_CHECK_VALUE(scale.has_value() == quantised, op, ": ", scale_name, quantised ? " is missing" : " is given",
                    " for ", name, " of ", tensor.scalar_type());
  if (!quantised) return kv;
  check_index(op, scale_name, *scale, at::kFloat, tensor.device());
  check_no_grad(op, scale_name, *scale);
  TORCH_CHECK_VALUE(scale->sizes() == tensor.sizes().slice(0, 3), op, ": ", scale_name, " must have shape ",
                    tensor.sizes().slice(0, 3), ", got ", scale->sizes());
  kv.scale = static_cast<float*>(scale->data_ptr());
  for (int d = 0; d < 3; ++d) kv.scale_stride[d] = scale->stride(d);
  return kv;
}

// Everything but what lengths and the block table hold: see check_kv_slots.
inline KvCache kv_cache(const char* op, int64_t batch, const at::Tensor& k_cache, const at::Tensor& v_cache,
                        const at::Tensor& lengths, const std::optional<at::Tensor>& block_table, bool ring,
                        const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale) {
  const at::Device device = k_cache.device();
  TORCH_CHECK_VALUE(k_cache.dim() == 4, op, ": k_cache must have shape (",
                    block_table.has_value() ? "pages, kv_heads, page_size" : "batch, kv_heads, capacity",
                    ", head_dim), got ", k_cache.sizes());
  TORCH_CHECK_VALUE(v_cache.sizes() == k_cache.sizes(), op, ": v_cache must have k_cache's shape ", k_cache.sizes(),
                    ", got ", v_cache.sizes());
  check_device(op, "v_cache", v_cache, device);
  KvCache cache{};
  cache.k = kv_tensor(op, "k_cache", k_cache, "k_scale", k_scale);
  cache.v = kv_tensor(op, "v_cache", v_cache, "v_scale", v_scale);
  TORCH_CHECK_TYPE(cache.k.dtype == cache.v.dtype, op, ": v_cache must have k_cache's dtype ", k_cache.scalar_type(),
                   ", got ", v_cache.scalar_type());
  cache.batch = batch, cache.kv_heads = k_cache.size(1), cache.head_dim = k_cache.size(3);
  cache.pages = k_cache.size(0), cache.page_size = k_cache.size(2), cache.max_pages = 1;
  cache.ring = ring;
  if (block_table.has_value()) {
    check_index(op, "block_table", *block_table, at::kInt, device);
    TORCH_CHECK_VALUE(block_table->dim() == 2 && block_table->size(0) == batch, op,
                      ": block_table must have shape (batch, pages of a sequence) for a batch of ", batch, ", got ",
                      block_table->sizes());
    cache.block_table = block_table->const_data_ptr<int32_t>();
    cache.max_pages = block_table->size(1);
    for (int d = 0; d < 2; ++d) cache.block_table_stride[d] = block_table->stride(d);
  } else {
    TORCH_CHECK_VALUE(cache.pages == batch, op, ": k_cache holds ", cache.pages, " sequences for a batch of ", batch);
  }
  TORCH_CHECK_VALUE(cache.max_pages * cache.page_size >= 1, op,
                    ": the cache has no room for a token: k_cache of shape ", k_cache.sizes(), ", ", cache.max_pages,
                    " pages per sequence");
  check_index(op, "lengths", lengths, at::kLong, device);
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.size(0) == batch, op, ": lengths must have shape (", batch,
                    ",), got ", lengths.sizes());
  cache.lengths = lengths.const_data_ptr<int64_t>();
  cache.lengths_stride = lengths.stride(0);
  return cache;
}

// Where the host can read them: every position in [lengths - positions, lengths) of every sequence lies in the cache.
inline void check_kv_slots(const char* op, const KvCache& cache, int64_t positions) {
  const int64_t capacity = cache.max_pages * cache.page_size;
  for (int64_t b = 0; b < cache.batch; ++b) {
    const int64_t length = kv_length(cache, b);
    TORCH_CHECK_VALUE(length >= 0 && (cache.ring || length <= capacity), op, ": lengths holds ", length,
                      " for sequence ", b, ", and the cache ", cache.ring ? "any number from 0" : "at most ",
                      cache.ring ? "" : std::to_string(capacity));
    if (cache.block_table == nullptr) continue;
    int64_t position = std::max<int64_t>(0, length - std::min(positions, capacity));
    for (; position < length; position += cache.page_size - kv_slot(cache, b, position).slot) {
      TORCH_CHECK_INDEX(kv_slot(cache, b, position).page >= 0, op, ": block_table names a page outside [0, ",
                        cache.pages, ") for position ", position, " of sequence ", b);
    }
  }
}

// The same where only the device can read them, and PYGEN_DEBUG asks for it: it waits for all that was launched before.
inline void check_kv_slots_in_debug_mode(const char* op, KvCache cache, const at::Tensor& lengths,
                                         const std::optional<at::Tensor>& block_table, int64_t positions) {
  const char* const debug = std::getenv("PYGEN_DEBUG");
  if (debug == nullptr || std::string_view(debug).empty() || std::string_view(debug) == "0") return;
  const at::Tensor lengths_here = lengths.cpu();
  cache.lengths = lengths_here.const_data_ptr<int64_t>();
  cache.lengths_stride = lengths_here.stride(0);
  at::Tensor table_here;
  if (block_table.has_value()) {
    table_here = block_table->cpu();
    cache.block_table = table_here.const_data_ptr<int32_t>();
    for (int d = 0; d < 2; ++d) cache.block_table_stride[d] = table_here.stride(d);
  }
  check_kv_slots(op, cache, positions);
}

}  // namespace pygen
