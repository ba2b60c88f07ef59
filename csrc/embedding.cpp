#include "pygen/embedding.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "rope_table.h"

namespace pygen {
namespace {

constexpr const char* kOp = "embedding";

EmbeddingTable embedding_table(const char* name, const at::Tensor& table, const at::Tensor& like) {
  check_no_grad(kOp, name, table);
  check_device(kOp, name, table, like.device());
  TORCH_CHECK_TYPE(table.scalar_type() == like.scalar_type(), kOp, ": ", name, " must have weight's dtype ",
                   like.scalar_type(), ", got ", table.scalar_type());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == like.size(-1) && (table.stride(1) == 1 || table.size(1) <= 1),
                    kOp, ": ", name, " must have shape (rows, width), of weight's width, and be contiguous in width, ",
                    "got ", table.sizes(), " with strides ", table.strides());
  return {table.const_data_ptr(), table.stride(0), table.size(0)};
}

// Every token, and every position, has a row.
void check_rows(const EmbeddingArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t t = 0; t < args.length; ++t) {
      const int64_t token = args.tokens[b * args.tokens_stride[0] + t * args.tokens_stride[1]];
      TORCH_CHECK_INDEX(token >= 0 && token < args.weight.rows, kOp, ": token ", token,
                        " lies outside the vocabulary, which holds ", args.weight.rows);
      if (args.position_weight.data == nullptr) continue;
      const int64_t position = args.positions.at(b, t);
      TORCH_CHECK_INDEX(position >= 0 && position < args.position_weight.rows, kOp, ": position ", position,
                        " lies outside position_weight, which holds ", args.position_weight.rows);
    }
  }
}

[[maybe_unused]] void launch(const Cpu& cpu, const EmbeddingArgs& args) {
  cpu.run(embedding, args, args.batch * args.length, (kMoveGrain + args.width - 1) / args.width);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const EmbeddingArgs& args) { gpu.run(cuda::embedding, args); }
#endif

template <class Backend>
void embedding_op(const at::Tensor& tokens, const at::Tensor& weight, double scale,
                  const std::optional<at::Tensor>& positions, const std::optional<at::Tensor>& position_weight,
                  const at::Tensor& out) {
  // Check and describe.
  const at::Device device = weight.device();
  EmbeddingArgs args{};
  check_index(kOp, "tokens", tokens, at::kLong, device);
  TORCH_CHECK_VALUE(tokens.dim() == 2, kOp, ": tokens must have shape (batch, length), got ", tokens.sizes());
  args.batch = tokens.size(0), args.length = tokens.size(1);
  args.tokens = tokens.const_data_ptr<int64_t>();
  args.tokens_stride[0] = tokens.stride(0), args.tokens_stride[1] = tokens.stride(1);
  args.weight_dtype = kernel_dtype(kOp, "weight", weight);
  args.weight = embedding_table("weight", weight, weight);
  args.width = weight.size(1);
  args.scale = static_cast<float>(scale);
  TORCH_CHECK_VALUE(positions.has_value() == position_weight.has_value(), kOp,
                    ": give positions and position_weight together");
  if (positions.has_value()) {
    args.positions = rope_positions(kOp, *positions, args.batch, args.length, device);
    args.position_weight = embedding_table("position_weight", *position_weight, weight);
  }
  check_no_grad(kOp, "out", out);
  check_device(kOp, "out", out, device);
  TORCH_CHECK_VALUE(out.dim() == 3 && out.size(0) == args.batch && out.size(1) == args.length &&
                        out.size(2) == args.width && (out.stride(2) == 1 || args.width <= 1),
                    kOp, ": out must have tokens' shape and weight's width, [", args.batch, ", ", args.length, ", ",
                    args.width, "], and be contiguous in width, got ", out.sizes(), " with strides ", out.strides());
  args.out = {out.data_ptr(), {out.stride(0), out.stride(1)}, kernel_dtype(kOp, "out", out)};
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, weight);
  if (position_weight.has_value()) at::assert_no_overlap(out, *position_weight);
  if (out.numel() == 0) return;
  if (Backend::host_can_read()) check_rows(args);

  // Launch.
  launch(Backend(weight), args);
}

PYGEN_OP("embedding", embedding_op,
         "(Tensor tokens, Tensor weight, float scale, Tensor? positions, Tensor? position_weight, Tensor(a!) out) -> "
         "()")

}  // namespace
}  // namespace pygen
