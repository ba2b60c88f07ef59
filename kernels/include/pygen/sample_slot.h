// Where sample_token's CPU kernel keeps what it knows of a row: in one piece of memory, of which it only needs the
// first number to be 0, and leaves it so.
#pragma once

#include <type_traits>

#include "pygen/sample_token.h"

namespace pygen {

struct SampleSlot {
  int64_t* finished;  // parts that are done
  BlockSummary *summaries, *raw;
  int64_t* listed;          // how many candidates each part has
  float *logit, *scratch;   // of candidates: a part's begin where its blocks do, a vector more for each part before
  int32_t* index;           // likewise
  int32_t *met, *met_from;  // the previous tokens by block, where each block's begin
  int64_t bytes;

  PYGEN_INLINE SampleSlot(const SampleTokenArgs& args, char* at) {
    const char* begin = at;
    const int64_t blocks = (args.vocabulary + kRowBlock - 1) / kRowBlock;
    const int64_t places = blocks * kRowBlock + args.parts * kPadding;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
      at += (count * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(finished, 1);
    take(summaries, blocks);
    take(raw, blocks);
    take(listed, args.parts);
    take(met_from, blocks + args.parts);
    take(met, args.parts * args.history);
    take(logit, places);
    take(index, places);
    take(scratch, places);
    bytes = at - begin;
  }
  static constexpr int64_t kPadding = 16;

  // The blocks of a part begin here; of part `parts`, they end.
  static PYGEN_INLINE int first_block(int blocks, int64_t parts, int64_t part) {
    return static_cast<int>(blocks * part / parts);
  }
};

}  // namespace pygen
