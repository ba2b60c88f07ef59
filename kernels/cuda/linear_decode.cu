// linear_decode on a GPU: a block to every panel and eight rows, of whose lines its warps take turns.
//
// A line is 128 bytes, 32 outputs by 1 (float32), 2 (bfloat16), 4 (int8) or 8 (int4) inputs: a warp reads four at once,
// 16 bytes per lane, which are four outputs of one line. Each lane adds up its own lines; the four lanes that share
// outputs are added by shuffles, the warps in their order through shared memory. What a row gives does not depend on
// the rows beside it, nor on how blocks are scheduled. Beyond eight rows a panel has several blocks, neighbours in the
// grid: the first takes it from memory, the others from the second-level cache. Where there are fewer panels than
// multiprocessors, each is shared by two blocks, which take half of every line.
//
// Bound by the reading of the weights as long as arithmetic keeps up: a row takes an fma per float weight, or half a
// dp2a per code (16-bit numbers times bytes; a whole one where x or out is float32). Of a GPU with 7 fma and 1 or 2
// dp2a per byte of bandwidth (data-centre ones of the last years), that keeps up with 16 rows of float32, 8 of
// bfloat16, 4 of int8 and 2 of int4; beyond, products set the pace. Tensor cores would lift that bound, and not the
// first.
#include "pygen/device.h"
#include "pygen/gated_unit_rule.h"
#include "pygen/linear_decode.h"

namespace pygen::cuda {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kLine = 4 * kPanel;  // bytes
constexpr int kOutputs = 4;        // of a lane
constexpr int kLoads = 4;          // of a lane, at once
constexpr int kMostRows = 8;       // together: the registers hold their sums
constexpr int kInputsUnit = 256;   // that a batch of lines divides
constexpr int kManyBlocks = 132;   // as many as a large GPU has multiprocessors

constexpr int line_inputs_of(WeightFormat format) {
  constexpr int kInputs[] = {1, 2, 4, 8};
  return kInputs[static_cast<int>(format)];
}
// The workspace. Rows are computed together, 1, 2, 4 or 8 of them; of a line's inputs those of all the rows lie
// together, then the next line's: floats, or 16-bit words (twice where x or out is float32).
struct Layout {
  int together, line_inputs, words;
  int chunk;       // inputs that have a power of two in common
  int groups;      // of rows, each of one expert
  int64_t inputs;  // padded
  int64_t lines_at, scales_at, specials_at, slots_at, experts_at, bytes;

  constexpr explicit Layout(const LinearDecodeArgs& args) {
    const PackedLinear& weight = args.weight;
    // Of experts, twice what one has if all are liked the same.
    const int64_t wanted = args.experts == nullptr ? args.rows : 2 * args.rows / args.expert_count;
    together = 1;
    while (together < kMostRows && together < wanted) together *= 2;
    line_inputs = line_inputs_of(weight.format);
    words = weight.quantised() ? linear_words(args) : 0;
    chunk = weight.group < kInputsUnit ? static_cast<int>(weight.group) : kInputsUnit;
    inputs = (weight.padded_inputs() + kInputsUnit - 1) / kInputsUnit * kInputsUnit;
    const int64_t apart = args.experts == nullptr             ? 1
                          : args.rows < args.expert_count + 1 ? args.rows
                                                              : args.expert_count + 1;
    groups = static_cast<int>((args.rows + apart * (together - 1)) / together);  // at the most
    const int64_t rows = int64_t{groups} * together;
    lines_at = rows * inputs * 4;
    scales_at = lines_at + rows * inputs * 2 * words;
    specials_at = scales_at + (words == 0 ? 0 : rows * chunks() * 4);
    slots_at = specials_at + rows * 4;
    experts_at = slots_at + (args.experts == nullptr ? 0 : rows * 4);
    bytes = experts_at + (args.experts == nullptr ? 0 : groups * 4);
  }

  constexpr int64_t chunks() const { return (inputs + chunk - 1) / chunk; }
  // Of a row, where input i lies among those of its group's lines.
  constexpr int64_t in_lines(int64_t row, int64_t i) const {
    const int64_t line = row / together * (inputs / line_inputs) + i / line_inputs;
    return (line * together + row % together) * line_inputs + i % line_inputs;
  }
  constexpr int64_t float_at(int64_t row, int64_t i) const { return words == 0 ? in_lines(row, i) : row * inputs + i; }
  // Where a row's chunks have their scales, `together` apart.
  constexpr int64_t scale_at(int64_t row) const { return row / together * together * chunks() + row % together; }
};

// ---- Experts -------------------------------------------------------------------------------------------------------

// The row of out that a slot of a group has, or -1; and a group's expert, or -1 where there is no such group.
PYGEN_INLINE int32_t& slot_row(const LinearDecodeArgs& args, const Layout& layout, int64_t slot) {
  return reinterpret_cast<int32_t*>(args.scratch + layout.slots_at)[slot];
}
PYGEN_INLINE int32_t& group_expert(const LinearDecodeArgs& args, const Layout& layout, int64_t group) {
  return reinterpret_cast<int32_t*>(args.scratch + layout.experts_at)[group];
}
PYGEN_INLINE int64_t row_of(const LinearDecodeArgs& args, const Layout& layout, int64_t slot) {
  return args.experts == nullptr ? slot : slot_row(args, layout, slot);
}

constexpr int kExpertThreads = 256;

// Groups of rows, by their expert: a thread to each expert. One that there is not has the number expert_count.
__global__ void __launch_bounds__(kExpertThreads)
    experts_kernel(const __grid_constant__ LinearDecodeArgs args, const __grid_constant__ Layout layout) {
  __shared__ int shared[kExpertThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto belongs = [&](int64_t row, int64_t expert) {
    const int64_t named = args.experts[row];
    return (named >= 0 && named < args.expert_count ? named : args.expert_count) == expert;
  };
  for (int i = threadIdx.x; i < layout.groups * layout.together; i += kExpertThreads) slot_row(args, layout, i) = -1;
  for (int i = threadIdx.x; i < layout.groups; i += kExpertThreads) group_expert(args, layout, i) = -1;
  int before = 0;  // groups of the experts before
  for (int64_t base = 0; base <= args.expert_count; base += kExpertThreads) {
    const int64_t expert = base + threadIdx.x;
    int count = 0;
    for (int64_t row = 0; row < args.rows; ++row) count += belongs(row, expert);
    const int groups = (count + layout.together - 1) / layout.together;
    int until = groups;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kWholeWarp, until, step);
      if (lane >= step) until += other;
    }
    __syncthreads();
    if (lane == kWarp - 1) shared[warp] = until;
    __syncthreads();
    int first = before + until - groups;
    for (int w = 0; w < kExpertThreads / kWarp; ++w) {
      if (w < warp) first += shared[w];
      before += shared[w];
    }
    for (int g = 0; g < groups; ++g) group_expert(args, layout, first + g) = static_cast<int32_t>(expert);
    int64_t slot = int64_t{first} * layout.together;
    for (int64_t row = 0; count > 0 && row < args.rows; ++row) {
      if (belongs(row, expert)) slot_row(args, layout, slot++) = static_cast<int32_t>(row);
    }
  }
}

// ---- Rows: a block to each -----------------------------------------------------------------------------------------

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kStaged = 11264;  // inputs that shared memory holds meanwhile; longer rows stay in the workspace

// The same in all threads.
PYGEN_INLINE double row_sum(double value, double* shared) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kRowWarps; ++warp) sum += shared[warp];
  return sum;
}

PYGEN_INLINE float element(const Operand& operand, int64_t index, float otherwise) {
  if (operand.data == nullptr) return otherwise;
  const int64_t offset = index * operand.stride[0] * size_of(operand.dtype);
  return load_one(static_cast<const char*>(operand.data) + offset, operand.dtype);
}
PYGEN_INLINE char* place(const Operand& operand, int64_t row, int64_t column) {
  const int64_t offset = row * operand.stride[0] + column * operand.stride[1];
  return static_cast<char*>(operand.data) + offset * size_of(operand.dtype);
}

// Calls visit(i, x) for the thread's inputs; x(i) is where one lies.
template <class Place, class Visit>
PYGEN_INLINE void each_input(const LinearDecodeArgs& args, Place x, Visit visit) {
  for (int64_t i = threadIdx.x; i < args.weight.inputs; i += kRowThreads) visit(i, x(i));
}

template <class Place>
PYGEN_INLINE void normalise(const LinearDecodeArgs& args, Place place_of, double* shared) {
  const int64_t inputs = args.weight.inputs;
  double sum = 0.0, square = 0.0;
  if (args.norm == LinearNorm::kLayer) {
    each_input(args, place_of, [&](int64_t, float x) { sum += x; });
    sum = row_sum(sum, shared);
  }
  const double mean = sum / static_cast<double>(inputs);
  each_input(args, place_of, [&](int64_t, float x) { square += (x - mean) * (x - mean); });
  square = row_sum(square, shared);
  const double rate = 1.0 / ::sqrt(square / static_cast<double>(inputs) + args.eps);
  // Next to the mean, x - center is exact.
  const float center = static_cast<float>(mean), factor = static_cast<float>(rate);
  const float offset = static_cast<float>((center - mean) * rate);
  each_input(args, place_of, [&](int64_t i, float& x) {
    x = fma(x - center, factor, offset) * element(args.norm_weight, i, 1.0f) + element(args.norm_bias, i, 0.0f);
  });
}

PYGEN_INLINE bool finite(float v) { return v - v == 0.0f; }

// int4's bytes hold codes 0 4 1 5 of a line, and above them 2 6 3 7: so the words.
PYGEN_INLINE int64_t word_of(WeightFormat format, int64_t i) {
  return format == WeightFormat::kInt8 ? i : (i & ~int64_t{7}) + (i & 3) * 2 + (i >> 2 & 1);
}

// A chunk of a row, by a warp; whether some of it is not finite.
PYGEN_INLINE bool make_chunk(const LinearDecodeArgs& args, const Layout& layout, const float* x, int64_t row,
                             int64_t index, float& scale) {
  const int lane = threadIdx.x % kWarp;
  uint16_t* const words = reinterpret_cast<uint16_t*>(args.scratch + layout.lines_at);
  const int64_t plane = layout.inputs * layout.groups * layout.together, first = index * layout.chunk;
  const int64_t end = first + layout.chunk < layout.inputs ? first + layout.chunk : layout.inputs;
  uint32_t most = 0;  // as bits: these order as numbers do
  bool special = false;
  for (int64_t i = first + lane; i < end; i += kWarp) {
    const uint32_t magnitude = to_unsigned(x[i]) & 0x7fffffffu;
    special |= !finite(x[i]);
    if (finite(x[i]) && magnitude > most) most = magnitude;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kWholeWarp, most, step);
    most = other > most ? other : most;
  }
  const uint32_t exponent = most >> 23 > 34 ? most >> 23 : 34;  // biased; below 2^-93 nothing is told apart
  const float up = from_unsigned((268 - exponent) << 23);
  for (int64_t i = first + lane; i < end; i += kWarp) {
    float v = finite(x[i]) ? x[i] * up : 0.0f;
    uint16_t* const to = words + layout.in_lines(row, word_of(args.weight.format, i));
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      if (word == layout.words) break;
      const float rounded = (v + 0x1.8p23f) - 0x1.8p23f;
      const float whole = min(max(rounded, -32767.0f), 32767.0f);
      to[word * plane] = static_cast<uint16_t>(static_cast<int32_t>(whole));
      v = (v - whole) * 0x1p15f;
    }
  }
  // int4's codes are taken 16 times.
  const uint32_t less = (layout.words == 2 ? 29 : 14) + (args.weight.format == WeightFormat::kInt4 ? 4 : 0);
  if (lane == 0) scale = from_unsigned((exponent - less) << 23);
  return __any_sync(kWholeWarp, special);
}

__global__ void __launch_bounds__(kRowThreads, 1)
    rows_kernel(const __grid_constant__ LinearDecodeArgs args, const __grid_constant__ Layout layout) {
  __shared__ double shared[kRowWarps];
  __shared__ float staged[kStaged];
  const int64_t row = blockIdx.x, of_out = row_of(args, layout, row);  // of the workspace, and of out
  if (of_out < 0) return;
  const int64_t of_x = args.experts == nullptr ? row : of_out / args.choices;
  float* const own = reinterpret_cast<float*>(args.scratch);
  const bool stays = layout.inputs <= kStaged;
  const auto there = [&](int64_t i) -> float& { return own[layout.float_at(row, i)]; };
  const auto place_of = [&](int64_t i) -> float& { return stays ? staged[i] : there(i); };
  for (int64_t i = threadIdx.x; i < layout.inputs; i += kRowThreads) {
    place_of(i) = i < args.weight.inputs ? load_one(place(args.x, of_x, i), args.x.dtype) : 0.0f;
  }
  if (args.norm != LinearNorm::kNone) normalise(args, place_of, shared);
  if (stays) {  // a thread wrote what it reads here
    for (int64_t i = threadIdx.x; i < layout.inputs; i += kRowThreads) there(i) = staged[i];
  }
  if (layout.words == 0) return;
  __syncthreads();
  float* const scales = reinterpret_cast<float*>(args.scratch + layout.scales_at) + layout.scale_at(row);
  bool special = false;
  for (int64_t c = threadIdx.x / kWarp; c < layout.chunks(); c += kRowWarps) {
    special |=
        make_chunk(args, layout, stays ? staged : own + row * layout.inputs, row, c, scales[c * layout.together]);
  }
  special = __syncthreads_or(special);
  if (threadIdx.x == 0) reinterpret_cast<int32_t*>(args.scratch + layout.specials_at)[row] = special;
}

// ---- Panels --------------------------------------------------------------------------------------------------------

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// A lane's part of a panel and of a group of rows, where so many blocks share a panel. Of rows that are not there, what
// memory holds is computed.
struct Lane {
  const LinearDecodeArgs& args;
  const Layout& layout;
  int64_t index;  // of the panel
  const char* panel;
  int64_t group;                  // of rows
  int lines, share, team, first;  // its outputs are first .. first + 3

  PYGEN_INLINE Lane(const LinearDecodeArgs& args, const Layout& layout, int line_inputs, int shares)
      : args(args),
        layout(layout),
        index(blockIdx.x / layout.groups / shares),
        panel(static_cast<const char*>(args.weight.data) + index * args.weight.panel_bytes()),
        group(blockIdx.x % layout.groups),
        lines(static_cast<int>(args.weight.padded_inputs() / line_inputs)),
        share(blockIdx.x / layout.groups % shares),
        team(threadIdx.x % kWarp / (kPanel / kOutputs / shares)),
        first(share * (kPanel / shares) + threadIdx.x % (kPanel / kOutputs / shares) * kOutputs) {
    if (args.experts == nullptr) return;
    const int64_t expert = group_expert(args, layout, group);
    if (expert >= args.expert_count) lines = 0;
    panel += (lines == 0 ? 0 : expert) * args.weight.panels() * args.weight.panel_bytes();
  }
};

constexpr int teams_of(int shares) { return kWarp / (kPanel / kOutputs) * shares; }  // of lanes, each with a line

template <WeightFormat kFormat, int kRows, int kShares_>
struct Floats {
  static constexpr int kLineInputs = line_inputs_of(kFormat), kShares = kShares_, kTeams = teams_of(kShares);
  const Lane& lane;
  const float* x;

  PYGEN_INLINE explicit Floats(const Lane& lane)
      : lane(lane), x(reinterpret_cast<const float*>(lane.args.scratch) + lane.group * kRows * lane.layout.inputs) {}

  PYGEN_INLINE int64_t place(int line) const { return int64_t{line} * kLine; }

  PYGEN_INLINE void add(int first_line, const uint4 (&weights)[kLoads], float (&sum)[kRows][kOutputs]) const {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const float* const v = x + int64_t{first_line + l * kTeams + lane.team} * (kRows * kLineInputs);
      const uint32_t w[kOutputs] = {weights[l].x, weights[l].y, weights[l].z, weights[l].w};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kFormat == WeightFormat::kFloat32) {
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) sum[r][o] = fma(from_unsigned(w[o]), v[r], sum[r][o]);
        } else {
          const float2 two = reinterpret_cast<const float2*>(v)[r];
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) {
            sum[r][o] = fma(from_unsigned(w[o] & 0xffff0000u), two.y, sum[r][o]);
            sum[r][o] = fma(from_unsigned(w[o] << 16), two.x, sum[r][o]);
          }
        }
      }
    }
  }
};

// Codes, of which kSpan loads share a scale.
template <WeightFormat kFormat, int kSpan, int kRows, int kShares_>
struct Codes {
  static constexpr int kLineInputs = line_inputs_of(kFormat), kShares = kShares_, kTeams = teams_of(kShares);
  static constexpr int kLineBytes = 2 * kLineInputs;  // of a row
  static constexpr int kNever = 31;                   // a shift
  const Lane& lane;
  const char* x;
  const float* scales;
  int64_t plane;
  int group_shift, chunk_shift;  // from a line to its group and its chunk

  PYGEN_INLINE explicit Codes(const Lane& lane)
      : lane(lane),
        x(lane.args.scratch + lane.layout.lines_at + lane.group * (kRows * 2) * lane.layout.inputs),
        scales(reinterpret_cast<const float*>(lane.args.scratch + lane.layout.scales_at) +
               lane.layout.scale_at(lane.group * kRows)),
        plane(lane.layout.inputs * lane.layout.groups * (kRows * 2)) {
    const auto shift = [&](int64_t inputs) {
      return lane.lines * kLineInputs <= inputs ? kNever : __ffs(static_cast<int>(inputs) / kLineInputs) - 1;
    };
    group_shift = shift(lane.args.weight.group);
    chunk_shift = shift(lane.layout.chunk);
  }

  PYGEN_INLINE int64_t place(int line) const {
    return int64_t{line} * kLine + ((line >> group_shift) + 1) * lane.args.weight.header_bytes();
  }

  // Scales or zeros of the lane's outputs.
  PYGEN_INLINE void numbers(const char* from, float (&to)[kOutputs]) const {
    const uint4 both = *reinterpret_cast<const uint4*>(from + lane.first % (kPanel / 2) * 4);
    const uint32_t pairs[kOutputs] = {both.x, both.y, both.z, both.w};
    const int left = lane.first < kPanel / 2 ? 16 : 0;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) to[o] = from_unsigned(pairs[o] << left & 0xffff0000u);
  }

  // Adds the products of a line's words with signed bytes: of int4 16 (code - 8).
  PYGEN_INLINE static int add_words(int sum, const char* words, uint32_t codes) {
    if constexpr (kFormat == WeightFormat::kInt8) {
      const int2 v = *reinterpret_cast<const int2*>(words);
      const int centred = static_cast<int>(codes ^ 0x80808080u);
      return __dp2a_hi(v.y, centred, __dp2a_lo(v.x, centred, sum));
    } else {
      const int4 v = *reinterpret_cast<const int4*>(words);
      const int low = static_cast<int>((codes << 4 & 0xf0f0f0f0u) ^ 0x80808080u);
      const int high = static_cast<int>((codes & 0xf0f0f0f0u) ^ 0x80808080u);
      sum = __dp2a_hi(v.y, low, __dp2a_lo(v.x, low, sum));
      return __dp2a_hi(v.w, high, __dp2a_lo(v.z, high, sum));
    }
  }

  PYGEN_INLINE void add(int first_line, const uint4 (&weights)[kLoads], float (&sum)[kRows][kOutputs]) const {
    constexpr int kStep = kTeams * kRows * kLineBytes;  // between the words of two loads
    constexpr uint32_t kOnes = kFormat == WeightFormat::kInt8 ? 0x81818181u : 0x99999999u;
    const PackedLinear& weight = lane.args.weight;
#pragma unroll
    for (int l = 0; l < kLoads; l += kSpan) {
      const int line = first_line + l * kTeams + lane.team;
      if (line >= lane.lines) return;
      const int group = line >> group_shift;
      const char* const header = lane.panel + place(group << group_shift) - weight.header_bytes();
      float scale[kOutputs];
      numbers(header, scale);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float value[kOutputs] = {};
#pragma unroll 1
        for (int word = 0; word < lane.layout.words; ++word) {
          const char* const words = x + word * plane + (int64_t{line} * kRows + r) * kLineBytes;
          int dot[kOutputs] = {};
#pragma unroll
          for (int s = 0; s < kSpan; ++s) {
            const uint32_t w[kOutputs] = {weights[l + s].x, weights[l + s].y, weights[l + s].z, weights[l + s].w};
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) dot[o] = add_words(dot[o], words + s * kStep, w[o]);
          }
          float part[kOutputs];
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) part[o] = to_float(dot[o]);
          if (weight.zeros) {
            float zero[kOutputs];
            numbers(header + 2 * kPanel, zero);
            int all = 0;
#pragma unroll
            for (int s = 0; s < kSpan; ++s) all = add_words(all, words + s * kStep, kOnes);
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) {
              part[o] = fma(static_cast<float>(weight.middle()) - zero[o], to_float(all), part[o]);
            }
          }
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) value[o] = fma(value[o], 0x1p15f, part[o]);
        }
        const float row_scale = scales[int64_t{line >> chunk_shift} * kRows + r];
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) sum[r][o] = fma(value[o], scale[o] * row_scale, sum[r][o]);
      }
    }
  }
};

// Weight (input, output) of a panel of codes.
PYGEN_INLINE float weight_at(const PackedLinear& weight, const char* panel, int64_t input, int output) {
  panel += input / weight.group * (weight.header_bytes() + weight.code_bytes());
  const int64_t k = input % weight.group;
  const auto number = [&](int64_t offset) {
    const auto half = reinterpret_cast<const uint16_t*>(panel + offset)[output % 16 * 2 + output / 16];
    return from_unsigned(uint32_t{half} << 16);
  };
  const bool bytes = weight.format == WeightFormat::kInt8;
  const int per_word = bytes ? 4 : 8, i = static_cast<int>(k % per_word);
  const auto word = reinterpret_cast<const uint32_t*>(panel + weight.header_bytes())[k / per_word * kPanel + output];
  const uint32_t code = bytes ? word >> (8 * i) & 255u : word >> (4 * (i / 2) + 16 * (i % 2)) & 15u;
  return number(0) * (static_cast<float>(code) - (weight.zeros ? number(64) : static_cast<float>(weight.middle())));
}

// The products of what is not finite, which has no words.
PYGEN_INLINE float special_sum(const LinearDecodeArgs& args, const Layout& layout, const char* panel, int64_t row,
                               int output) {
  float sum = 0.0f;
  if (reinterpret_cast<const int32_t*>(args.scratch + layout.specials_at)[row] == 0) return sum;
  const float* const x = reinterpret_cast<const float*>(args.scratch) + row * layout.inputs;
  for (int64_t k = 0; k < args.weight.inputs; ++k) {
    if (!finite(x[k])) sum += x[k] * weight_at(args.weight, panel, k, output);
  }
  return sum;
}

PYGEN_INLINE float activated(const LinearDecodeArgs& args, float x) {
  if (!args.activated) return x;
  if (args.activation == Activation::kSilu) return activate<Activation::kSilu>(x);
  return args.activation == Activation::kGelu ? activate<Activation::kGelu>(x) : activate<Activation::kGeluTanh>(x);
}

template <class Weights, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    panels_kernel(const __grid_constant__ LinearDecodeArgs args, const __grid_constant__ Layout layout) {
  static_assert(kRows * kPanel <= kThreads);
  __shared__ float shared[kWarps][kRows][kPanel];
  if (args.experts != nullptr && group_expert(args, layout, blockIdx.x % layout.groups) < 0) return;
  constexpr int kTeams = Weights::kTeams, kBatch = kLoads * kTeams;
  const Lane lane(args, layout, Weights::kLineInputs, Weights::kShares);
  const Weights weights(lane);
  const int warp = threadIdx.x / kWarp;
  float sum[kRows][kOutputs] = {};
  const auto load = [&](int first_line, uint4(&to)[kLoads]) {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int line = first_line + l * kTeams + lane.team;
      to[l] = line < lane.lines ? load_streamed(lane.panel + weights.place(line) + lane.first * 4)
                                : make_uint4(0u, 0u, 0u, 0u);
    }
  };
  constexpr bool kAhead = kRows <= 4;  // more rows leave no registers for it, and no need
  uint4 now[kLoads], next[kLoads];
  if constexpr (kAhead) load(warp * kBatch, next);
#pragma unroll 1
  for (int line = warp * kBatch; line < lane.lines; line += kWarps * kBatch) {
    if constexpr (kAhead) {
#pragma unroll
      for (int l = 0; l < kLoads; ++l) now[l] = next[l];
      load(line + kWarps * kBatch, next);
    } else {
      load(line, now);
    }
    weights.add(line, now, sum);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int step = kWarp / kTeams; step < kWarp; step *= 2)
        sum[r][o] += __shfl_xor_sync(kWholeWarp, sum[r][o], step);
      if (lane.team == r % kTeams) shared[warp][r][lane.first + o] = sum[r][o];
    }
  }
  __syncthreads();

  const int width = args.weight.width(), own = width / Weights::kShares;
  const int r = threadIdx.x / own, output = lane.share * own + threadIdx.x % own;
  const int64_t slot = lane.group * kRows + r, column = lane.index * width + output;
  if (r >= kRows || column >= args.weight.outputs) return;
  const int64_t row = row_of(args, layout, slot);
  if (row < 0 || row >= args.rows) return;
  const auto projected = [&](int in_panel, int64_t in_bias) {
    float y = 0.0f;
    for (int w = 0; w < kWarps; ++w) y += shared[w][r][in_panel];
    if (args.weight.quantised() && lane.lines > 0) y += special_sum(args, layout, lane.panel, slot, in_panel);
    return y + element(args.bias, in_bias, 0.0f);
  };
  float y = activated(args, projected(output, column));
  if (args.weight.gated) y *= projected(width + output, args.weight.outputs + column);
  if (args.soft_cap != 0.0f) y = soft_capped(y, args.soft_cap);
  if (args.residual.data != nullptr) y += load_one(place(args.residual, row, column), args.residual.dtype);
  store_one(place(args.out, row, column), args.out.dtype, y);
}

template <template <int, int> class Weights, int kRows = 1>
void launch_panels(const LinearDecodeArgs& args, const Layout& layout, void* stream) {
  if constexpr (kRows < kMostRows) {
    if (layout.together > kRows) return launch_panels<Weights, 2 * kRows>(args, layout, stream);
  }
  const int64_t blocks = args.weight.panels() * layout.groups;
  const bool shared = !args.weight.gated && blocks < kManyBlocks;  // a gate and what it is for lie in halves of a line
  const auto kernel = shared ? panels_kernel<Weights<kRows, 2>, kRows> : panels_kernel<Weights<kRows, 1>, kRows>;
  const dim3 grid(static_cast<unsigned>(shared ? 2 * blocks : blocks));
  PYGEN_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, args, layout);
}

template <int kRows, int kShares>
using Float32 = Floats<WeightFormat::kFloat32, kRows, kShares>;
template <int kRows, int kShares>
using BFloat16 = Floats<WeightFormat::kBFloat16, kRows, kShares>;
// kInputs: of neighbours, at the least, that share a scale.
template <int kInputs>
struct Spans {
  static constexpr int span(int line_inputs, int shares) {
    const int loads = kInputs / line_inputs / teams_of(shares);
    return loads >= kLoads ? kLoads : loads >= 2 ? 2 : 1;
  }
  template <int kRows, int kShares>
  using Int8 = Codes<WeightFormat::kInt8, span(4, kShares), kRows, kShares>;
  template <int kRows, int kShares>
  using Int4 = Codes<WeightFormat::kInt4, span(8, kShares), kRows, kShares>;
};

}  // namespace

int64_t linear_decode_workspace(const LinearDecodeArgs& args) { return Layout(args).bytes; }

void linear_decode(const LinearDecodeArgs& args, void* stream) {
  const Layout layout(args);
  if (args.experts != nullptr) PYGEN_LAUNCH(experts_kernel, dim3(1), dim3(kExpertThreads), 0, stream, args, layout);
  const int64_t rows = args.experts == nullptr ? args.rows : int64_t{layout.groups} * layout.together;
  PYGEN_LAUNCH(rows_kernel, dim3(static_cast<unsigned>(rows)), dim3(kRowThreads), 0, stream, args, layout);
  const int64_t group = args.weight.group;
  const bool one = args.weight.padded_inputs() == group;  // scale for all inputs
  switch (args.weight.format) {
    case WeightFormat::kFloat32:
      return launch_panels<Float32>(args, layout, stream);
    case WeightFormat::kBFloat16:
      return launch_panels<BFloat16>(args, layout, stream);
    case WeightFormat::kInt8:
      return one || group >= 128 ? launch_panels<Spans<128>::Int8>(args, layout, stream)
             : group == 64       ? launch_panels<Spans<64>::Int8>(args, layout, stream)
                                 : launch_panels<Spans<32>::Int8>(args, layout, stream);
    case WeightFormat::kInt4:
      return one || group >= 128 ? launch_panels<Spans<128>::Int4>(args, layout, stream)
             : group == 64       ? launch_panels<Spans<64>::Int4>(args, layout, stream)
                                 : launch_panels<Spans<32>::Int4>(args, layout, stream);
  }
}

}  // namespace pygen::cuda
