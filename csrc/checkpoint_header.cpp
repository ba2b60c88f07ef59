#include "checkpoint_header.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <string_view>

namespace pygen {
namespace {

using Bytes = std::span<const uint8_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message;
  (message.append(parts), ...);
  throw HeaderError(message);
}

std::string number(uint64_t value) { return std::to_string(value); }

// Text of a file in an error message: short, and printable whatever it holds.
std::string quoted(std::string_view text) {
  constexpr size_t kShown = 80;
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kShown)) {
    const uint8_t byte = static_cast<uint8_t>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  return out + (text.size() > kShown ? "...'" : "'");
}

// RFC 3629: no surrogates, no overlong forms, nothing above U+10FFFF.
bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const uint8_t lead = static_cast<uint8_t>(text[i]);
    const size_t length = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    if (length == 0 || length > text.size() - i) return false;
    for (size_t k = 1; k < length; ++k) {
      const uint8_t byte = static_cast<uint8_t>(text[i + k]);
      const uint8_t low = k > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
      const uint8_t high = k > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
      if (byte < low || byte > high) return false;
    }
    i += length;
  }
  return true;
}

std::optional<uint64_t> product(uint64_t a, uint64_t b) {
  uint64_t result;
  return __builtin_mul_overflow(a, b, &result) ? std::nullopt : std::optional(result);
}

// How a dtype is stored: rows are whole blocks.
struct Format {
  std::string_view name;
  uint64_t block, bytes;
};

// The bytes of a tensor.
uint64_t stored_bytes(std::string_view name, const std::vector<uint64_t>& shape, const Format& format) {
  std::optional<uint64_t> bytes = format.bytes;
  for (size_t d = 0; d < shape.size(); ++d) {
    const bool last = d + 1 == shape.size();
    if (last && shape[d] % format.block != 0) {
      fail("tensor ", quoted(name), " has rows of ", number(shape[d]), " elements, and ", format.name,
           " has blocks of ", number(format.block));
    }
    if (bytes) bytes = product(*bytes, last ? shape[d] / format.block : shape[d]);
  }
  // A product that overflows before a dimension of 0 is refused too: no such tensor is written.
  if (!bytes || *bytes > INT64_MAX) fail("tensor ", quoted(name), " has a shape whose size overflows");
  if (shape.empty() && format.block != 1) fail("tensor ", quoted(name), " of ", format.name, " has no dimensions");
  return *bytes;
}

// Names of tensors and keys of fields are each there once.
void check_names(const CheckpointHeader& header) {
  const auto check = [](std::string_view kind, std::vector<std::string_view> names) {
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) fail(kind, " ", quoted(*twice), " is there twice");
  };
  std::vector<std::string_view> names, keys;
  for (const StoredTensor& tensor : header.tensors) names.push_back(tensor.name);
  for (const auto& [key, value] : header.metadata) keys.push_back(key);
  for (const auto& [key, length] : header.array_lengths) keys.push_back(key);
  check("tensor", std::move(names));
  check("field", std::move(keys));
}

// --- safetensors: a length of 8 bytes, a JSON object, the data -------------------------------------------------------

constexpr Format kJsonFormats[] = {
    {"BOOL", 1, 1}, {"U8", 1, 1},  {"I8", 1, 1},  {"F8_E4M3", 1, 1}, {"F8_E5M2", 1, 1}, {"F8_E8M0", 1, 1},
    {"U16", 1, 2},  {"I16", 1, 2}, {"F16", 1, 2}, {"BF16", 1, 2},    {"U32", 1, 4},     {"I32", 1, 4},
    {"F32", 1, 4},  {"U64", 1, 8}, {"I64", 1, 8}, {"F64", 1, 8},     {"C64", 1, 8},
};

// The JSON that a safetensors header is made of, and no other: objects, strings, lists of integers. No recursion.
class Json {
 public:
  explicit Json(std::string_view text) : text_(text) {}

  void expect(char c) {
    if (!take(c)) fail("header: expected ", quoted({&c, 1}), " at byte ", number(at_), ", got ", here());
  }

  bool take(char c) {
    skip_space();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  // Calls item() for each one up to the closing bracket.
  template <class Item>
  void list(char open, char close, Item item) {
    expect(open);
    if (take(close)) return;
    do item();
    while (take(','));
    expect(close);
  }

  template <class Field>
  void object(Field field) {
    list('{', '}', [&] {
      std::string key = string();
      expect(':');
      field(std::move(key));
    });
  }

  std::string string() {
    expect('"');
    std::string out;
    while (true) {
      if (at_ == text_.size()) fail("header: a string does not end");
      const char c = text_[at_++];
      if (c == '"') break;
      if (static_cast<uint8_t>(c) < 0x20) fail("header: a control character in a string at byte ", number(at_ - 1));
      if (c == '\\') {
        escape(out);
      } else {
        out += c;
      }
    }
    if (!is_utf8(out)) fail("header: the string ", quoted(out), " is not UTF-8");
    return out;
  }

  uint64_t integer(std::string_view what) {
    skip_space();
    const size_t start = at_;
    uint64_t value = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      const uint64_t digit = static_cast<uint64_t>(text_[at_++] - '0');
      if (__builtin_mul_overflow(value, uint64_t{10}, &value) || __builtin_add_overflow(value, digit, &value) ||
          value > INT64_MAX) {
        fail("header: ", what, " at byte ", number(start), " is too large");
      }
    }
    const bool zero_first = at_ - start > 1 && text_[start] == '0';
    const bool fraction = at_ < text_.size() && (text_[at_] == '.' || text_[at_] == 'e' || text_[at_] == 'E');
    if (at_ == start || zero_first || fraction) {
      fail("header: ", what, " at byte ", number(start), " must be a count, got ", quoted(text_.substr(start, 20)));
    }
    return value;
  }

  void end() {
    skip_space();
    if (at_ != text_.size()) fail("header: ", here(), " at byte ", number(at_), " after its end");
  }

 private:
  std::string here() const { return at_ == text_.size() ? "its end" : quoted(text_.substr(at_, 1)); }

  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  uint32_t hex4() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = at_ < text_.size() ? text_[at_++] : '\0';
      const size_t digit = std::string_view("0123456789abcdef").find(c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c);
      if (digit == std::string_view::npos) fail("header: a bad \\u escape at byte ", number(at_));
      value = value * 16 + static_cast<uint32_t>(digit);
    }
    return value;
  }

  void escape(std::string& out) {
    const char c = at_ < text_.size() ? text_[at_++] : '\0';
    constexpr std::string_view kShort = "\"\\/bfnrt", kMeaning = "\"\\/\b\f\n\r\t";
    if (const size_t i = kShort.find(c); i != std::string_view::npos) {
      out += kMeaning[i];
      return;
    }
    if (c != 'u') fail("header: a bad escape at byte ", number(at_ - 1));
    uint32_t point = hex4();
    if (point >= 0xd800 && point < 0xdc00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const uint32_t low = hex4();
      if (low < 0xdc00 || low > 0xdfff) fail("header: half a surrogate pair at byte ", number(at_));
      point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
    }
    const auto byte = [&](uint32_t value) { out += static_cast<char>(value); };
    if (point < 0x80) {
      byte(point);
    } else if (point < 0x800) {
      byte(0xc0 | point >> 6), byte(0x80 | (point & 63));
    } else if (point < 0x10000) {  // a lone surrogate becomes bytes that is_utf8 refuses
      byte(0xe0 | point >> 12), byte(0x80 | (point >> 6 & 63)), byte(0x80 | (point & 63));
    } else {
      byte(0xf0 | point >> 18), byte(0x80 | (point >> 12 & 63)), byte(0x80 | (point >> 6 & 63)),
          byte(0x80 | (point & 63));
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

// One tensor's object. Its range still counts from the data's beginning.
StoredTensor json_tensor(Json& json, std::string name) {
  if (name.empty() || name.size() > kMaxName) fail("header: a name of ", number(name.size()), " bytes: ", quoted(name));
  StoredTensor tensor{std::move(name), "", {}, 0, 0};
  std::vector<uint64_t> offsets;
  const std::string which = "tensor " + quoted(tensor.name);
  std::array<bool, 3> seen{};
  const auto once = [&](int i, const std::string& key) {
    if (seen[i]) fail(which, " has ", quoted(key), " twice");
    seen[i] = true;
  };
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      once(0, key);
      tensor.format = json.string();
    } else if (key == "shape") {
      once(1, key);
      json.list('[', ']', [&] {
        tensor.shape.push_back(json.integer("a dimension of " + which));
        if (tensor.shape.size() > kMaxShape) fail(which, " has more than ", number(kMaxShape), " dimensions");
      });
    } else if (key == "data_offsets") {
      once(2, key);
      json.list('[', ']', [&] {
        offsets.push_back(json.integer("an offset of " + which));
        if (offsets.size() > 2) fail(which, " has more than two data_offsets");
      });
    } else {
      fail(which, " has an unknown field ", quoted(key));
    }
  });
  for (int i = 0; i < 3; ++i) {
    if (!seen[i]) fail(which, " lacks ", std::array{"dtype", "shape", "data_offsets"}[i]);
  }
  if (offsets.size() != 2) fail(which, " must have two data_offsets");
  tensor.begin = offsets[0], tensor.end = offsets[1];

  const auto format = std::find_if(std::begin(kJsonFormats), std::end(kJsonFormats),
                                   [&](const Format& format) { return format.name == tensor.format; });
  if (format == std::end(kJsonFormats)) fail(which, " has an unknown dtype ", quoted(tensor.format));
  const uint64_t bytes = stored_bytes(tensor.name, tensor.shape, *format);
  if (tensor.end < tensor.begin || tensor.end - tensor.begin != bytes) {
    fail(which, " has data_offsets ", number(tensor.begin), " to ", number(tensor.end), ", and its shape takes ",
         number(bytes), " bytes");
  }
  return tensor;
}

// --- GGUF: values, tensors, and the data from the next multiple of the alignment -------------------------------------

// In the order of ggml's numbers; those with a block are read.
constexpr Format kGgmlFormats[] = {
    {"F32", 1, 4},    {"F16", 1, 2},        {"Q4_0", 32, 18},     {"Q4_1", 0, 0},       {"Q4_2", 0, 0},
    {"Q4_3", 0, 0},   {"Q5_0", 0, 0},       {"Q5_1", 0, 0},       {"Q8_0", 32, 34},     {"Q8_1", 0, 0},
    {"Q2_K", 0, 0},   {"Q3_K", 0, 0},       {"Q4_K", 0, 0},       {"Q5_K", 0, 0},       {"Q6_K", 0, 0},
    {"Q8_K", 0, 0},   {"IQ2_XXS", 0, 0},    {"IQ2_XS", 0, 0},     {"IQ3_XXS", 0, 0},    {"IQ1_S", 0, 0},
    {"IQ4_NL", 0, 0}, {"IQ3_S", 0, 0},      {"IQ2_S", 0, 0},      {"IQ4_XS", 0, 0},     {"I8", 0, 0},
    {"I16", 0, 0},    {"I32", 0, 0},        {"I64", 0, 0},        {"F64", 0, 0},        {"IQ1_M", 0, 0},
    {"BF16", 1, 2},   {"Q4_0_4_4", 0, 0},   {"Q4_0_4_8", 0, 0},   {"Q4_0_8_8", 0, 0},   {"TQ1_0", 0, 0},
    {"TQ2_0", 0, 0},  {"IQ4_NL_4_4", 0, 0}, {"IQ4_NL_4_8", 0, 0}, {"IQ4_NL_8_8", 0, 0}, {"MXFP4", 0, 0},
};

enum class ValueType : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64 };
constexpr uint64_t kValueBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // 0: it varies

class Cursor {
 public:
  explicit Cursor(Bytes file) : bytes_(file.first(std::min<size_t>(file.size(), kMaxGgufHeader))) {}

  uint64_t at() const { return at_; }
  uint64_t left() const { return bytes_.size() - at_; }

  Bytes take(uint64_t count, std::string_view what) {
    if (count > left()) {
      fail("the header ends in ", what, bytes_.size() == kMaxGgufHeader ? ", or is too large" : ": truncated");
    }
    at_ += count;
    return bytes_.subspan(at_ - count, count);
  }

  template <class T>
  T value(std::string_view what) {
    T result;
    std::memcpy(&result, take(sizeof(T), what).data(), sizeof(T));
    return result;
  }

  std::string_view string(uint64_t most, std::string_view what) {
    const uint64_t length = value<uint64_t>(what);
    if (length > most) fail(what, " has ", number(length), " bytes, and at most ", number(most), " are read");
    const Bytes text = take(length, what);
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }

  // A name or a value that Python will see as text.
  std::string text(uint64_t most, std::string_view what) {
    const std::string_view result = string(most, what);
    if (!is_utf8(result)) fail(what, " is not UTF-8: ", quoted(result));
    return std::string(result);
  }

 private:
  Bytes bytes_;
  size_t at_ = 0;
};

MetadataNumber gguf_number(Cursor& cursor, ValueType type, const std::string& what) {
  switch (type) {
    case ValueType::kU8:
      return uint64_t{cursor.value<uint8_t>(what)};
    case ValueType::kI8:
      return int64_t{cursor.value<int8_t>(what)};
    case ValueType::kU16:
      return uint64_t{cursor.value<uint16_t>(what)};
    case ValueType::kI16:
      return int64_t{cursor.value<int16_t>(what)};
    case ValueType::kU32:
      return uint64_t{cursor.value<uint32_t>(what)};
    case ValueType::kI32:
      return int64_t{cursor.value<int32_t>(what)};
    case ValueType::kU64:
      return cursor.value<uint64_t>(what);
    case ValueType::kI64:
      return cursor.value<int64_t>(what);
    case ValueType::kF32:
      return double{cursor.value<float>(what)};
    case ValueType::kF64:
      return cursor.value<double>(what);
    case ValueType::kBool: {
      const uint8_t byte = cursor.value<uint8_t>(what);
      if (byte > 1) fail(what, " is neither true nor false: ", number(byte));
      return byte == 1;
    }
    default:
      fail(what, " has an unknown type ", number(static_cast<uint32_t>(type)));
  }
}

void gguf_array(Cursor& cursor, const std::string& key, const std::string& what, CheckpointHeader& header) {
  const ValueType type = cursor.value<ValueType>(what);
  const uint64_t count = cursor.value<uint64_t>(what);
  const bool strings = type == ValueType::kString;
  if (type == ValueType::kArray) fail(what, " is an array of arrays");
  if (type > ValueType::kF64) fail(what, " has elements of an unknown type ", number(static_cast<uint32_t>(type)));
  const uint64_t bytes = strings ? sizeof(uint64_t) : kValueBytes[static_cast<uint32_t>(type)];  // of an element, least
  if (count > cursor.left() / bytes) fail(what, " has ", number(count), " elements, more than the file holds");
  if (!strings && count <= kMaxKeptArray) {
    std::vector<MetadataNumber> values;
    for (uint64_t i = 0; i < count; ++i) values.push_back(gguf_number(cursor, type, what));
    header.metadata.emplace_back(key, std::move(values));
    return;
  }
  header.array_lengths.emplace_back(key, count);
  if (strings) {
    for (uint64_t i = 0; i < count; ++i) cursor.string(kMaxString, what);
  } else {
    cursor.take(count * bytes, what);
  }
}

void gguf_value(Cursor& cursor, CheckpointHeader& header) {
  const std::string key = cursor.text(kMaxName, "a key");
  if (key.empty()) fail("a key is empty");
  const std::string what = "field " + quoted(key);
  const ValueType type = cursor.value<ValueType>(what);
  if (type == ValueType::kArray) {
    gguf_array(cursor, key, what, header);
  } else if (type == ValueType::kString) {
    header.metadata.emplace_back(key, cursor.text(kMaxString, what));
  } else {
    std::visit([&](auto value) { header.metadata.emplace_back(key, value); }, gguf_number(cursor, type, what));
  }
}

uint64_t gguf_alignment(const CheckpointHeader& header) {
  for (const auto& [key, value] : header.metadata) {
    if (key != "general.alignment") continue;
    const uint64_t* alignment = std::get_if<uint64_t>(&value);
    if (alignment == nullptr || !std::has_single_bit(*alignment) || *alignment > (1 << 20)) {
      fail("field 'general.alignment' must be a power of two, at most 2^20",
           alignment == nullptr ? "" : ", got " + number(*alignment));
    }
    return *alignment;
  }
  return 32;
}

// One tensor's entry. Its range still counts from the data's beginning.
StoredTensor gguf_tensor(Cursor& cursor) {
  StoredTensor tensor{cursor.text(kMaxName, "a tensor's name"), "", {}, 0, 0};
  if (tensor.name.empty()) fail("a tensor's name is empty");
  const std::string which = "tensor " + quoted(tensor.name);
  const uint32_t dims = cursor.value<uint32_t>(which);
  if (dims > 4) fail(which, " has ", number(dims), " dimensions, more than 4");
  for (uint32_t d = 0; d < dims; ++d) {
    tensor.shape.push_back(cursor.value<uint64_t>(which));
    if (tensor.shape.back() - 1 >= INT64_MAX) fail(which, " has a dimension that is negative or 0");
  }
  std::reverse(tensor.shape.begin(), tensor.shape.end());
  const uint32_t type = cursor.value<uint32_t>(which);
  if (type >= std::size(kGgmlFormats)) fail(which, " has an unknown type ", number(type));
  const Format& format = kGgmlFormats[type];
  if (format.block == 0) fail(which, " is ", format.name, ", and F32, F16, BF16, Q8_0 and Q4_0 are read");
  tensor.format = format.name;
  tensor.begin = cursor.value<uint64_t>(which);
  if (__builtin_add_overflow(tensor.begin, stored_bytes(tensor.name, tensor.shape, format), &tensor.end)) {
    fail(which, " has an offset that overflows: ", number(tensor.begin));
  }
  return tensor;
}

}  // namespace

CheckpointHeader parse_safetensors(Bytes file) {
  uint64_t length;
  if (file.size() < sizeof(length)) fail("not a safetensors file, or a truncated one: ", number(file.size()), " bytes");
  std::memcpy(&length, file.data(), sizeof(length));
  const uint64_t rest = file.size() - sizeof(length);
  if (length > kMaxJsonHeader) {
    fail("not a safetensors file: a header of ", number(length), " bytes, and at most ", number(kMaxJsonHeader),
         " are read");
  }
  if (length > rest) fail("truncated: a header of ", number(length), " bytes, and ", number(rest), " are there");

  CheckpointHeader header;
  Json json({reinterpret_cast<const char*>(file.data()) + sizeof(length), length});
  bool described = false;
  json.object([&](std::string key) {
    if (key != "__metadata__") {
      header.tensors.push_back(json_tensor(json, std::move(key)));
      if (header.tensors.size() > kMaxTensors) fail("more than ", number(kMaxTensors), " tensors");
      return;
    }
    if (described) fail("header: '__metadata__' is there twice");
    described = true;
    json.object([&](std::string key) {
      header.metadata.emplace_back(std::move(key), json.string());
      if (header.metadata.size() > kMaxFields) fail("more than ", number(kMaxFields), " fields of '__metadata__'");
    });
  });
  json.end();
  check_names(header);

  // The data is all used, once.
  std::vector<const StoredTensor*> order;
  for (const StoredTensor& tensor : header.tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const StoredTensor* a, const StoredTensor* b) {
    return std::pair(a->begin, a->end) < std::pair(b->begin, b->end);
  });
  const uint64_t data = sizeof(length) + length, size = file.size() - data;
  uint64_t at = 0;
  for (const StoredTensor* tensor : order) {
    if (tensor->begin < at) fail("tensor ", quoted(tensor->name), " overlaps another");
    if (tensor->begin > at) fail("a gap of ", number(tensor->begin - at), " bytes before ", quoted(tensor->name));
    at = tensor->end;
    if (at > size) fail("tensor ", quoted(tensor->name), " ends behind the file: truncated");
  }
  if (at != size) fail(number(size - at), " bytes after the last tensor");
  for (StoredTensor& tensor : header.tensors) tensor.begin += data, tensor.end += data;
  return header;
}

CheckpointHeader parse_gguf(Bytes file) {
  Cursor cursor(file);
  const Bytes magic = cursor.take(4, "its magic");
  if (std::memcmp(magic.data(), "GGUF", 4) != 0) fail("not a GGUF file: it must begin with 'GGUF'");
  const uint32_t version = cursor.value<uint32_t>("its version");
  if ((version & 0xffff) == 0) fail("a big-endian GGUF file, or a damaged one");
  if (version != 2 && version != 3) fail("GGUF version ", number(version), ", and 2 and 3 are read");
  const uint64_t tensors = cursor.value<uint64_t>("its tensor count");
  const uint64_t values = cursor.value<uint64_t>("its field count");
  constexpr uint64_t kLeastTensor = 8 + 1 + 4 + 4 + 8, kLeastValue = 8 + 1 + 4 + 1;
  if (tensors > std::min(kMaxTensors, cursor.left() / kLeastTensor)) {
    fail("a count of ", number(tensors), " tensors, more than the file holds");
  }
  if (values > std::min(kMaxFields, cursor.left() / kLeastValue)) {
    fail("a count of ", number(values), " fields, more than the file holds");
  }

  CheckpointHeader header;
  for (uint64_t i = 0; i < values; ++i) gguf_value(cursor, header);
  const uint64_t alignment = gguf_alignment(header);
  for (uint64_t i = 0; i < tensors; ++i) header.tensors.push_back(gguf_tensor(cursor));
  check_names(header);

  // Each tensor begins at the first multiple of the alignment behind the one before it; the padding of the last one may
  // be missing.
  const auto aligned = [&](uint64_t offset) { return (offset + alignment - 1) & ~(alignment - 1); };
  const uint64_t data = aligned(cursor.at());
  uint64_t at = 0;
  for (StoredTensor& tensor : header.tensors) {
    if (tensor.begin != aligned(at)) {
      fail("tensor ", quoted(tensor.name), " begins at ", number(tensor.begin), " of the data, not at ",
           number(aligned(at)), tensor.begin < at ? ": it overlaps another" : "");
    }
    at = tensor.end;
    if (at > file.size() || data > file.size() - at) {
      fail("tensor ", quoted(tensor.name), " ends behind the file: truncated");
    }
    tensor.begin += data, tensor.end += data;
  }
  if (file.size() > data && file.size() - data > aligned(at)) {
    fail(number(file.size() - data - aligned(at)), " bytes after the last tensor");
  }
  return header;
}

}  // namespace pygen
