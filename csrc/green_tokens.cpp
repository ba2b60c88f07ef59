#include "pygen/green_tokens.h"

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr const char* kOp = "green_tokens";

[[maybe_unused]] void launch(const Cpu& cpu, const GreenTokensArgs& args) {
  cpu.run(green_tokens, args, args.samples * args.green.capacity, 256);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const GreenTokensArgs& args) { gpu.run(cuda::green_tokens, args); }
#endif

template <class Backend>
void green_tokens_op(const at::Tensor& tokens, const at::Tensor& key, const at::Tensor& gamma, int64_t context,
                     const std::optional<at::Tensor>& lengths, bool ignore_repeated, const at::Tensor& green,
                     const std::optional<at::Tensor>& scored) {
  // Check and describe.
  TORCH_CHECK_VALUE(tokens.dim() == 2, kOp, ": tokens must have shape (batch, length), got ", tokens.sizes());
  const at::Device device = tokens.device();
  const int64_t samples = tokens.size(0);
  GreenTokensArgs args{};
  args.samples = samples;
  args.green = green_settings<Backend>(kOp, tokens, key, gamma, context, samples, device);
  args.lengths = setting<int64_t>(kOp, "lengths", lengths, samples, device);
  check_setting<Backend>(kOp, "lengths", args.lengths, samples, int64_t{0}, tokens.size(1));
  args.ignore_repeated = ignore_repeated;
  args.is_green = plane<bool>(kOp, "green", green, tokens.sizes(), device);
  args.scored = plane<bool>(kOp, "scored", scored, tokens.sizes(), device);
  if (tokens.numel() == 0) return;

  // Launch.
  launch(Backend(tokens), args);
}

PYGEN_OP("green_tokens", green_tokens_op,
         "(Tensor tokens, Tensor key, Tensor gamma, int context, Tensor? lengths, bool ignore_repeated, "
         "Tensor(a!) green, Tensor(b!)? scored) -> ()")

}  // namespace
}  // namespace pygen
