#include "pygen/attention.h"

#include "attention_call.h"

namespace pygen {
namespace {

constexpr const char* kOp = "attention";

void attention_op(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
                  const std::optional<at::Tensor>& lengths, bool causal, std::optional<int64_t> window,
                  std::optional<double> scale, double dropout_p, const std::optional<at::Tensor>& seed,
                  const std::optional<at::Tensor>& step, const std::optional<at::Tensor>& sample_ids,
                  const at::Tensor& out, const std::optional<at::Tensor>& logsumexp) {
  // Check and describe.
  AttentionCall call(kOp, q, k, v, mask, lengths, causal, window, scale, dropout_p, seed, step, sample_ids);
  AttentionArgs& args = call.args;
  args.out = call.rows("out", out, q.sizes());
  if (logsumexp.has_value()) args.logsumexp = call.of_queries("logsumexp", *logsumexp);
  at::assert_no_internal_overlap(out);
  for (const at::Tensor& tensor : {q, k, v}) at::assert_no_overlap(out, tensor);
  if (args.batch * args.queries == 0) return;

  // Launch.
  const AttentionLayout layout(args);
  const Cpu cpu(q);
  const at::Tensor packed = call.memory(cpu, layout.bytes);
  args.packed = static_cast<char*>(packed.data_ptr());
  cpu.run(attention_pack, args, args.batch * args.kv_heads * layout.blocks, 1);
  const int64_t tiles = (args.queries + AttentionLayout::kQueries - 1) / AttentionLayout::kQueries;
  cpu.run(attention, args, args.batch * args.heads * tiles, 1);
}

PYGEN_CPU_OP(
    "attention", attention_op,
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? lengths, bool causal, SymInt? window, float? scale, "
    "float dropout_p, Tensor? seed, Tensor? step, Tensor? sample_ids, Tensor(a!) out, Tensor(b!)? logsumexp) -> ()")

}  // namespace
}  // namespace pygen
