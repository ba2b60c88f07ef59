#include "pygen/sample_gram.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

constexpr const char* kOp = "sample_gram";

[[maybe_unused]] void launch(const Cpu& cpu, SampleGramArgs args, at::Device) {
  const int64_t samples = args.size[0], blocks = samples * args.blocks;
  const int sums = gram_sums(args.n_vectors);
  const at::Tensor partials = at::empty({blocks * sums}, at::kDouble);
  args.partials = partials.mutable_data_ptr<double>();
  cpu.keep(partials);
  cpu.run(sample_gram, args, blocks, kMoveGrain / kGramBlock);
  const auto entries = [args, sums](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gram_entry(args, i / (sums + 1), static_cast<int>(i % (sums + 1)));
  };
  cpu.run(entries, samples * (sums + 1), samples * (sums + 1));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, SampleGramArgs args, at::Device device) {
  const int64_t count = args.size[0] * args.blocks * gram_sums(args.n_vectors);
  const at::Tensor partials = at::empty({count}, at::TensorOptions().dtype(at::kDouble).device(device));
  args.partials = partials.mutable_data_ptr<double>();
  gpu.run(cuda::sample_gram, args);
}
#endif

template <class Backend>
void sample_gram_op(at::TensorList tensors, const at::Tensor& out) {
  // Check.
  const int64_t n = static_cast<int64_t>(tensors.size());
  TORCH_CHECK_VALUE(n >= 1 && n <= kMaxVectors, kOp, ": tensors must hold 1 to ", kMaxVectors, " of them, got ", n);
  const at::Tensor& first = tensors[0];
  TORCH_CHECK_VALUE(first.dim() >= 1, kOp, ": tensors must begin with the batch, got a scalar");
  const int64_t samples = first.size(0);
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(tensor.sizes() == first.sizes(), kOp, ": tensors must have one shape, got ", first.sizes(),
                      " and ", tensor.sizes());
    check_no_grad(kOp, "tensors", tensor);
    check_device(kOp, "tensors", tensor, first.device());
    at::assert_no_overlap(out, tensor);
  }
  check_index(kOp, "out", out, at::kDouble, first.device());
  TORCH_CHECK_VALUE(out.dim() == 3 && out.size(0) == samples && out.size(1) == n + 1 && out.size(2) == n + 1, kOp,
                    ": out must have shape (", samples, ", ", n + 1, ", ", n + 1, "), got ", out.sizes());
  at::assert_no_internal_overlap(out);

  // Describe.
  SampleGramArgs args{};
  c10::SmallVector<int64_t, kMaxDims> dims;
  for (int64_t d = 0; d < first.dim(); ++d) dims.push_back(d);
  IterationSpace space(first.sizes(), dims, /*leading=*/1, /*keep_order=*/false);
  for (int64_t i = 0; i < n; ++i) space.add(args.vector[i], kernel_dtype(kOp, "tensors", tensors[i]), tensors[i]);
  if (first.numel() == 0) {
    Backend(out).fill(out, 0.0);
    return;
  }
  args.ndim = space.finish(kOp, args.size);
  args.n_vectors = static_cast<int32_t>(n);
  args.sample_elements = first.numel() / samples;
  args.blocks = (args.sample_elements + kGramBlock - 1) / kGramBlock;
  args.out = out.mutable_data_ptr<double>();
  for (int d = 0; d < 3; ++d) args.out_stride[d] = out.stride(d);

  // Launch.
  launch(Backend(first), args, first.device());
}

PYGEN_OP("sample_gram", sample_gram_op, "(Tensor[] tensors, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
