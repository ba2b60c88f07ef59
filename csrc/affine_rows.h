// The table of coefficients, and which of its rows each sample takes: arguments of affine_step and of what looks ahead
// of it.
#pragma once

#include "operands.h"
#include "pygen/affine_step.h"

namespace pygen {

// `rows` holds one index, or one for each of the first 1 to `most_dims` dimensions of x.
inline void read_rows(const char* op, const at::Tensor& x, const at::Tensor& table, const at::Tensor& rows,
                      int64_t n_history, int64_t most_dims, AffineStepArgs& args) {
  const int64_t columns = kHistory + 2 * n_history;
  check_index(op, "table", table, at::kDouble, x.device());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == columns && (table.stride(1) == 1 || table.size(0) == 0), op,
                    ": table must have shape (rows, ", columns, ") for ", n_history, " history terms, got ",
                    table.sizes());
  check_index(op, "rows", rows, at::kLong, x.device());
  const bool one_row = rows.numel() == 1;
  const bool matches =
      rows.dim() <= most_dims && rows.dim() <= x.dim() && rows.sizes() == x.sizes().slice(0, rows.dim());
  TORCH_CHECK_VALUE(one_row || matches, op, ": rows must hold one index",
                    most_dims == 1 ? " or one per sample" : ", one per sample or one per (sample, token)",
                    "; got shape ", rows.sizes(), " for x of shape ", x.sizes());
  args.n_history = static_cast<int32_t>(n_history);
  args.table = table.const_data_ptr<double>();
  args.table_stride = table.stride(0);
  args.n_rows = table.size(0);
  args.rows = rows.const_data_ptr<int64_t>();
  for (int64_t d = 0; d < 2; ++d) args.rows_stride[d] = one_row || d >= rows.dim() ? 0 : rows.stride(d);
}

// Calls check(coefficients, index) for the row of every one of (samples, tokens).
template <class Check>
void check_rows(const char* op, const AffineStepArgs& args, int64_t samples, int64_t tokens, Check check) {
  int64_t checked = -1;
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t index = args.rows[b * args.rows_stride[0] + t * args.rows_stride[1]];
      TORCH_CHECK_INDEX(index >= 0 && index < args.n_rows, op, ": rows holds ", index, ", but the table has ",
                        args.n_rows, " rows");
      if (index != checked) check(args.table + index * args.table_stride, index);
      checked = index;
    }
  }
}

}  // namespace pygen
