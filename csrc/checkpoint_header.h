// The headers of checkpoint files, read from bytes that nobody has checked: safetensors and GGUF. No torch.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace pygen {

// What a parser says of a file it refuses: one line of printable ASCII.
struct HeaderError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct StoredTensor {
  std::string name;
  std::string format;           // safetensors' names, and ggml's: "F32", "BF16", "Q8_0", ...
  std::vector<uint64_t> shape;  // slowest dimension first
  uint64_t begin, end;          // bytes of the file
};

using MetadataNumber = std::variant<bool, int64_t, uint64_t, double>;
using MetadataValue = std::variant<bool, int64_t, uint64_t, double, std::string, std::vector<MetadataNumber>>;

// The ranges of tensors lie in the file, fit their shapes, and do not overlap; names and keys are UTF-8 and unique.
struct CheckpointHeader {
  std::vector<StoredTensor> tensors;
  std::vector<std::pair<std::string, MetadataValue>> metadata;
  // The arrays that are not in metadata, but checked and counted: those of strings, and of more than kMaxKeptArray.
  std::vector<std::pair<std::string, uint64_t>> array_lengths;
};

constexpr uint64_t kMaxJsonHeader = 100'000'000;  // bytes; the limit of the safetensors library too
constexpr uint64_t kMaxGgufHeader = 1 << 26;      // bytes before the data, vocabulary included
constexpr uint64_t kMaxTensors = 1 << 20;
constexpr uint64_t kMaxFields = 1 << 14;  // of the metadata
constexpr uint64_t kMaxString = 1 << 24;  // bytes of a metadata value
constexpr uint64_t kMaxName = 1 << 10;    // bytes of the name of a tensor or the key of a value
constexpr uint64_t kMaxShape = 8;
constexpr uint64_t kMaxKeptArray = 1 << 10;

// `file`: the whole file, of which only the header is read. Throw HeaderError; memory is a small multiple of the
// header.
CheckpointHeader parse_safetensors(std::span<const uint8_t> file);
CheckpointHeader parse_gguf(std::span<const uint8_t> file);

}  // namespace pygen
