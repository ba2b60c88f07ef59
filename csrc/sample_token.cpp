#include "pygen/sample_token.h"

#include <ATen/ops/empty.h>

#include "backend.h"
#include "planes.h"
#include "pygen/sample_slot.h"

namespace pygen {
namespace {

constexpr const char* kOp = "sample_token";
constexpr int64_t kTokenGrain = 32768;  // logits that are worth a thread

[[maybe_unused]] void launch(const Cpu& cpu, SampleTokenArgs& args, const at::Tensor& logits) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  args.parts = std::clamp<int64_t>(args.vocabulary / kTokenGrain, 1, std::max<int64_t>(1, threads / args.rows));
  args.slot_by_row = args.parts > 1 || cpu.program != nullptr;  // else by thread, of which a program knows nothing
  const int64_t bytes = SampleSlot(args, nullptr).bytes, slots = args.slot_by_row ? args.rows : threads;
  const at::Tensor workspace = at::empty({slots * bytes}, logits.options().dtype(at::kByte));
  args.workspace = static_cast<char*>(workspace.data_ptr());
  for (int64_t slot = 0; slot < slots; ++slot) *SampleSlot(args, args.workspace + slot * bytes).finished = 0;
  cpu.keep(workspace);
  const auto body = [args, bytes](int64_t begin, int64_t end) {
    SampleTokenArgs own = args;
    if (!args.slot_by_row) own.workspace += at::get_thread_num() * bytes;
    sample_token(own, begin, end);
  };
  cpu.run(body, args.rows * args.parts, std::max<int64_t>(1, kTokenGrain * args.parts / args.vocabulary));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, SampleTokenArgs& args, const at::Tensor& logits) {
  const at::Tensor workspace = at::empty({cuda::sample_token_workspace(args)}, logits.options().dtype(at::kByte));
  args.workspace = static_cast<char*>(workspace.data_ptr());
  gpu.run(cuda::sample_token, args);
}
#endif

// (rows, columns), or (columns) and (1, columns) for all rows.
at::Tensor for_rows(const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(at::is_expandable_to(tensor.sizes(), {rows, columns}) && tensor.size(-1) == columns, kOp, ": ",
                    name, " must have shape (", rows, ", ", columns, ") or (", columns, "), got ", tensor.sizes());
  return tensor.expand({rows, columns});
}

template <class Backend>
void sample_token_op(const at::Tensor& logits, const std::optional<at::Tensor>& temperature,
                     const std::optional<at::Tensor>& top_k, const std::optional<at::Tensor>& top_p,
                     const std::optional<at::Tensor>& min_p, const std::optional<at::Tensor>& typical_p,
                     const std::optional<at::Tensor>& repetition_penalty,
                     const std::optional<at::Tensor>& presence_penalty,
                     const std::optional<at::Tensor>& frequency_penalty, const std::optional<at::Tensor>& previous,
                     const std::optional<at::Tensor>& previous_lengths, const std::optional<at::Tensor>& logit_bias,
                     const std::optional<at::Tensor>& bitmask, const std::optional<at::Tensor>& seed,
                     const std::optional<at::Tensor>& step, const std::optional<at::Tensor>& sample_ids,
                     const at::Tensor& token, const std::optional<at::Tensor>& log_prob,
                     const std::optional<at::Tensor>& raw_log_prob, const std::optional<at::Tensor>& ok) {
  // Check and describe.
  TORCH_CHECK_VALUE(logits.dim() == 2, kOp, ": logits must have shape (batch, vocabulary), got ", logits.sizes());
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  TORCH_CHECK_VALUE(vocabulary >= 1 && vocabulary <= kRowBlock * kMaxRowBlocks, kOp, ": the vocabulary must hold 1 to ",
                    kRowBlock * kMaxRowBlocks, " tokens, got ", vocabulary);
  const at::Device device = logits.device();
  SampleTokenArgs args{};
  args.rows = rows, args.vocabulary = vocabulary;
  check_no_grad(kOp, "logits", logits);
  args.logits = {logits.data_ptr(), {logits.stride(0), 0, logits.stride(1)}, kernel_dtype(kOp, "logits", logits)};
  if (logit_bias.has_value()) {
    check_no_grad(kOp, "logit_bias", *logit_bias);
    check_device(kOp, "logit_bias", *logit_bias, device);
    const at::Tensor bias = for_rows("logit_bias", *logit_bias, rows, vocabulary);
    args.bias = {bias.data_ptr(), {bias.stride(0), 0, bias.stride(1)}, kernel_dtype(kOp, "logit_bias", bias)};
  }
  if (bitmask.has_value()) {
    const at::Tensor words = for_rows("bitmask", *bitmask, rows, (vocabulary + 31) / 32);
    args.bitmask = plane<const int32_t>(kOp, "bitmask", words, words.sizes(), device);
  }
  if (previous.has_value()) {
    TORCH_CHECK_VALUE(previous->dim() == 2 && previous->size(0) == rows, kOp, ": previous must have shape (", rows,
                      ", tokens), got ", previous->sizes());
    args.previous = plane<const int64_t>(kOp, "previous", previous, previous->sizes(), device);
    args.history = previous->size(1);
  } else {
    for (const auto& [name, given] : {std::pair{"previous_lengths", &previous_lengths},
                                      {"repetition_penalty", &repetition_penalty},
                                      {"presence_penalty", &presence_penalty},
                                      {"frequency_penalty", &frequency_penalty}}) {
      TORCH_CHECK_VALUE(!given->has_value(), kOp, ": ", name, " is about the tokens in previous, which is left out");
    }
  }
  args.previous_lengths = setting<int64_t>(kOp, "previous_lengths", previous_lengths, rows, device);
  args.repetition = setting<float>(kOp, "repetition_penalty", repetition_penalty, rows, device);
  args.presence = setting<float>(kOp, "presence_penalty", presence_penalty, rows, device);
  args.frequency = setting<float>(kOp, "frequency_penalty", frequency_penalty, rows, device);
  args.temperature = setting<float>(kOp, "temperature", temperature, rows, device);
  args.top_k = setting<int64_t>(kOp, "top_k", top_k, rows, device);
  args.top_p = setting<float>(kOp, "top_p", top_p, rows, device);
  args.min_p = setting<float>(kOp, "min_p", min_p, rows, device);
  args.typical_p = setting<float>(kOp, "typical_p", typical_p, rows, device);
  args.philox = philox_settings(kOp, seed, step, sample_ids, rows, device);
  args.token = column<int64_t>(kOp, "token", token, rows, device);
  args.log_prob = column<float>(kOp, "log_prob", log_prob, rows, device);
  args.raw_log_prob = column<float>(kOp, "raw_log_prob", raw_log_prob, rows, device);
  args.ok = column<bool>(kOp, "ok", ok, rows, device);
  if (rows == 0) return;

  // Launch.
  launch(Backend(logits), args, logits);
}

PYGEN_OP("sample_token", sample_token_op,
         "(Tensor logits, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? typical_p, "
         "Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, Tensor? previous, "
         "Tensor? previous_lengths, Tensor? logit_bias, Tensor? bitmask, Tensor? seed, Tensor? step, "
         "Tensor? sample_ids, Tensor(a!) token, Tensor(b!)? log_prob, Tensor(c!)? raw_log_prob, Tensor(d!)? ok) -> ()")

}  // namespace
}  // namespace pygen
