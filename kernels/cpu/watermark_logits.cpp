#include "pygen/watermark_logits.h"

#include "token_row.h"

namespace pygen::PYGEN_ISA {

void watermark_logits(const WatermarkLogitsArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.vocabulary + kRowBlock - 1) / kRowBlock;
  RowBlock x;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / blocks / args.positions, position = i / blocks % args.positions;
    const int block = static_cast<int>(i % blocks);
    OperandRow(args.logits, sample, position, args.vocabulary).load(block, x, 0.0f);
    add_green(green_list(args.green, sample, args.known(sample, position)), args.delta.at(sample, 0.0f), block, x);
    OperandRow(args.out, sample, position, args.vocabulary).store(block, x);
  }
}

}  // namespace pygen::PYGEN_ISA
