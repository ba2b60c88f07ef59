// The fuzz target over both parsers of checkpoint headers: libFuzzer's entry, under clang (`make fuzz`) or called by
// tests/fuzz/mutate.cpp.
#include "../../csrc/checkpoint_header.h"

#include <cstdio>
#include <cstdlib>
#include <optional>

namespace {

using Parser = pygen::CheckpointHeader (*)(std::span<const uint8_t>);

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

// What is accepted keeps what the header promises, and what is refused says why in one line of printable text.
void parse(Parser parser, std::span<const uint8_t> file) {
  std::optional<pygen::CheckpointHeader> header;
  try {
    header = parser(file);
  } catch (const pygen::HeaderError& error) {
    const std::string message = error.what();
    check(!message.empty() && message.size() < 4096, "the length of a message");
    for (const char c : message) check(c >= 0x20 && c < 0x7f, "a message is printable");
    return;
  }
  uint64_t bytes = 0;
  for (const pygen::StoredTensor& tensor : header->tensors) {
    check(tensor.begin <= tensor.end && tensor.end <= file.size(), "a tensor lies in the file");
    check(!tensor.name.empty() && !tensor.format.empty(), "a tensor has a name and a format");
    bytes += tensor.end - tensor.begin;
    uint64_t elements = 1;
    for (const uint64_t size : tensor.shape) elements *= size;
    check(elements / 2 <= tensor.end - tensor.begin, "a shape fits its bytes");  // 4 bits and more
  }
  check(bytes <= file.size(), "tensors do not overlap");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  parse(pygen::parse_safetensors, {data, size});
  parse(pygen::parse_gguf, {data, size});
  return 0;
}
