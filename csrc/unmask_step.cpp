#include "pygen/unmask_step.h"

#include <ATen/ops/empty.h>

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr const char* kOp = "unmask_step";

[[maybe_unused]] void launch(const Cpu& cpu, UnmaskStepArgs& args, const at::Tensor& sample) {
  const at::Tensor workspace = at::empty({args.samples * args.positions}, sample.options());
  args.workspace = static_cast<uint64_t*>(workspace.data_ptr());
  cpu.keep(workspace);
  cpu.run(unmask_step, args, args.samples, std::max<int64_t>(1, 4096 / args.positions));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, UnmaskStepArgs& args, const at::Tensor& sample) {
  at::Tensor workspace;
  if (const int64_t size = cuda::unmask_step_workspace(args.samples, args.positions); size > 0) {
    workspace = at::empty({size}, sample.options());
    args.workspace = static_cast<uint64_t*>(workspace.data_ptr());
  }
  gpu.run(cuda::unmask_step, args);
}
#endif

using Optional = std::optional<at::Tensor>;

template <class Backend>
void unmask_step_op(const at::Tensor& sample, const at::Tensor& token, const at::Tensor& score,
                    const Optional& mask_token, const Optional& fixed, const Optional& count, const Optional& remain,
                    const Optional& threshold, const Optional& budget, bool ties, const Optional& noise,
                    const Optional& seed, const Optional& step, const Optional& sample_ids, const Optional& temperature,
                    const Optional& fill, const Optional& edit_threshold, const Optional& shielded,
                    const at::Tensor& out, const Optional& accepted, const Optional& edited, const Optional& settled,
                    const Optional& order) {
  // Check and describe.
  TORCH_CHECK_VALUE(sample.dim() == 2 && sample.size(1) < int64_t{1} << 31, kOp,
                    ": sample must have shape (batch, positions), got ", sample.sizes());
  TORCH_CHECK_VALUE(!(noise.has_value() && seed.has_value()), kOp, ": give noise or seed, not both");
  const at::Device device = sample.device();
  const at::IntArrayRef size = sample.sizes();
  UnmaskStepArgs args{};
  args.samples = size[0], args.positions = size[1];
  args.sample = plane<const int64_t>(kOp, "sample", sample, size, device);
  args.token = plane<const int64_t>(kOp, "token", token, size, device);
  args.score = plane<const float>(kOp, "score", score, size, device);
  args.fixed = plane<const bool>(kOp, "fixed", fixed, size, device);
  args.shielded = plane<const bool>(kOp, "shielded", shielded, size, device);
  args.fill = plane<const int64_t>(kOp, "fill", fill, size, device);
  args.mask_token = setting<int64_t>(kOp, "mask_token", mask_token, size[0], device);
  args.count = setting<int64_t>(kOp, "count", count, size[0], device);
  args.remain = setting<int64_t>(kOp, "remain", remain, size[0], device);
  args.threshold = setting<float>(kOp, "threshold", threshold, size[0], device);
  args.budget = setting<float>(kOp, "budget", budget, size[0], device);
  args.edit_threshold = setting<float>(kOp, "edit_threshold", edit_threshold, size[0], device);
  args.temperature = setting<float>(kOp, "temperature", temperature, size[0], device);
  args.philox = philox_settings(kOp, seed, step, sample_ids, size[0], device);
  if (noise.has_value()) {
    check_device(kOp, "noise", *noise, device);
    TORCH_CHECK_VALUE(noise->sizes() == size, kOp, ": noise must have shape ", size, ", got ", noise->sizes());
    args.noise = {noise->data_ptr(), {noise->stride(0), noise->stride(1)}, kernel_dtype(kOp, "noise", *noise)};
  }
  args.ties = ties;
  args.next = plane<int64_t>(kOp, "out", out, size, device);
  args.accepted = plane<bool>(kOp, "accepted", accepted, size, device);
  args.edited = plane<bool>(kOp, "edited", edited, size, device);
  args.settled = plane<bool>(kOp, "settled", settled, size, device);
  args.order = plane<int64_t>(kOp, "order", order, size, device);
  for (const Optional* input : {&fixed, &shielded, &fill}) {
    if (input->has_value()) at::assert_no_partial_overlap(out, **input);
  }
  at::assert_no_partial_overlap(out, sample);
  at::assert_no_partial_overlap(out, token);
  if (sample.numel() == 0) return;

  // Launch.
  launch(Backend(sample), args, sample);
}

PYGEN_OP("unmask_step", unmask_step_op,
         "(Tensor sample, Tensor token, Tensor score, Tensor? mask_token, Tensor? fixed, Tensor? count, "
         "Tensor? remain, Tensor? threshold, Tensor? budget, bool ties, Tensor? noise, Tensor? seed, Tensor? step, "
         "Tensor? sample_ids, Tensor? temperature, Tensor? fill, Tensor? edit_threshold, Tensor? shielded, "
         "Tensor(a!) out, Tensor(b!)? accepted, Tensor(c!)? edited, Tensor(d!)? settled, Tensor(e!)? order) -> ()")

}  // namespace
}  // namespace pygen
