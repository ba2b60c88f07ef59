#include "pygen/route_token.h"

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr const char* kOp = "route_token";

[[maybe_unused]] void launch(const Cpu& cpu, const RouteTokenArgs& args) {
  cpu.run(route_token, args, args.samples * args.positions, kNoiseGrain);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const RouteTokenArgs& args) { gpu.run(cuda::route_token, args); }
#endif

using Optional = std::optional<at::Tensor>;

template <class Backend>
void route_token_op(const at::Tensor& sample, const at::Tensor& token, const at::Tensor& weights,
                    c10::SymInt vocabulary, const Optional& random, const Optional& noise, const Optional& seed,
                    const Optional& step, const Optional& sample_ids, const at::Tensor& out) {
  // Check and describe.
  TORCH_CHECK_VALUE(sample.dim() == 2, kOp, ": sample must have shape (batch, positions), got ", sample.sizes());
  TORCH_CHECK_VALUE(noise.has_value() != seed.has_value(), kOp, ": give noise or seed, and not both");
  TORCH_CHECK_VALUE(random.has_value() || seed.has_value(), kOp, ": give random tokens, or seed to draw them");
  const at::Device device = sample.device();
  const at::IntArrayRef size = sample.sizes();
  RouteTokenArgs args{};
  args.samples = size[0], args.positions = size[1];
  args.vocabulary = vocabulary.guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(args.vocabulary >= 1 && args.vocabulary < int64_t{1} << 31, kOp,
                    ": vocabulary must lie in [1, 2^31), got ", args.vocabulary);
  args.sample = plane<const int64_t>(kOp, "sample", sample, size, device);
  args.token = plane<const int64_t>(kOp, "token", token, size, device);
  args.random = plane<const int64_t>(kOp, "random", random, size, device);
  check_index(kOp, "weights", weights, at::kFloat, device);
  TORCH_CHECK_VALUE(weights.dim() >= 1 && weights.dim() <= 2 && weights.size(-1) == kRouteColumns &&
                        weights.stride(-1) == 1 && (weights.dim() == 1 || weights.size(0) == size[0]),
                    kOp, ": weights must have shape (", kRouteColumns, ",) or (", size[0], ", ", kRouteColumns,
                    "), got ", weights.sizes());
  args.weights = {weights.const_data_ptr<float>(), weights.dim() == 1 ? 0 : weights.stride(0)};
  const int64_t routes[] = {size[0], size[1], 3};
  if (noise.has_value()) args.noise = row_operand(kOp, "noise", *noise, routes, device);
  args.philox = philox_settings(kOp, seed, step, sample_ids, size[0], device);
  args.next = plane<int64_t>(kOp, "out", out, size, device);
  for (const at::Tensor* input : {&sample, &token}) at::assert_no_partial_overlap(out, *input);
  if (sample.numel() == 0) return;

  // Launch.
  launch(Backend(sample), args);
}

PYGEN_OP(
    "route_token", route_token_op,
    "(Tensor sample, Tensor token, Tensor weights, SymInt vocabulary, Tensor? random, Tensor? noise, Tensor? seed, "
    "Tensor? step, Tensor? sample_ids, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
