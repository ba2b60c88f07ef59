#include "pygen/attention_backward.h"

#include "attention_call.h"

namespace pygen {
namespace {

constexpr const char* kOp = "attention's backward pass";

void attention_backward_op(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& out, const at::Tensor& logsumexp, const std::optional<at::Tensor>& mask,
                           const std::optional<at::Tensor>& lengths, bool causal, std::optional<int64_t> window,
                           std::optional<double> scale, double dropout_p, const std::optional<at::Tensor>& seed,
                           const std::optional<at::Tensor>& step, const std::optional<at::Tensor>& sample_ids,
                           const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v) {
  // Check and describe.
  AttentionCall call(kOp, q, k, v, mask, lengths, causal, window, scale, dropout_p, seed, step, sample_ids);
  AttentionBackwardArgs args{};
  call.args.out = call.rows("out", out, q.sizes());
  call.args.logsumexp = call.of_queries("logsumexp", logsumexp);
  args.forward = call.args;
  args.grad = call.rows("grad", grad, q.sizes());
  args.grad_q = call.rows("grad_q", grad_q, q.sizes());
  args.grad_k = call.rows("grad_k", grad_k, k.sizes());
  args.grad_v = call.rows("grad_v", grad_v, v.sizes());
  for (const at::Tensor& written : {grad_q, grad_k, grad_v}) {
    at::assert_no_internal_overlap(written);
    for (const at::Tensor& tensor : {grad, q, k, v, out}) at::assert_no_overlap(written, tensor);
  }
  at::assert_no_overlap(grad_q, grad_k), at::assert_no_overlap(grad_q, grad_v), at::assert_no_overlap(grad_k, grad_v);
  const AttentionArgs& of = args.forward;
  if (of.batch == 0) return;

  // Launch.
  const AttentionBackwardLayout layout(args);
  args.workers = std::min<int64_t>(of.batch * of.kv_heads * layout.units, at::get_num_threads());
  const Cpu cpu(q);
  const at::Tensor memory = call.memory(cpu, args.workers * layout.worker_bytes);
  const at::Tensor partial = call.memory(cpu, layout.partial_bytes);
  args.memory = static_cast<char*>(memory.data_ptr());
  args.partial = static_cast<float*>(partial.data_ptr());
  cpu.run(attention_backward, args, args.workers, 1);
  if (layout.units != 1) cpu.run(attention_backward_queries, args, of.batch * of.heads * layout.tiles, 1);
}

PYGEN_CPU_OP(
    "attention_backward", attention_backward_op,
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor? mask, Tensor? lengths, "
    "bool causal, SymInt? window, float? scale, float dropout_p, Tensor? seed, Tensor? step, Tensor? sample_ids, "
    "Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()")

}  // namespace
}  // namespace pygen
