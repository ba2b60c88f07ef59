// winograd_conv2d: a 3x3 convolution of stride 1, padded by 1, by tiles of 2x2 pixels (Lavin & Gray 2015, F(2x2, 3x3)):
// what 4 pixels see is 4x4 pixels, whose transform is multiplied by that of the weight: 16 products in the place of 36.
//
// Products of many tiles at once are those of matrices, (tiles, channels) (channels, outputs), one of each of the 16.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"
#include "pygen/tile_product.h"

namespace pygen {

struct WinogradConv2dArgs {
  static constexpr int64_t kTiles = 128;  // of a block
  static constexpr int64_t kPanel = 64;   // outputs that are computed at once

  int64_t batch, height, width, channels, outputs;
  Operand x, out;       // of one dtype; strides of batch, rows, columns: channels lie side by side
  const float* weight;  // the transformed: (16, panels, channels, kPanel), 64-byte aligned
  const void* bias;     // of x's dtype, or null
  TileProduct product;
  char* memory;             // 64-byte aligned: of each worker, WinogradLayout(args).bytes
  int64_t workers, groups;  // groups: of panels, which are units of work as blocks of tiles are

  constexpr int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  constexpr int64_t rows_of_tiles() const { return (height + 1) / 2; }
  constexpr int64_t columns_of_tiles() const { return (width + 1) / 2; }
  constexpr int64_t tiles() const { return batch * rows_of_tiles() * columns_of_tiles(); }
  constexpr int64_t blocks() const { return (tiles() + kTiles - 1) / kTiles; }
};

// A worker's memory, in floats: transformed tiles (16, kTiles, channels), products (16, kTiles, kPanel), and zeros in
// the place of the pixels outside. The 16 lie a cache line apart, or they would fall into the same sets.
struct WinogradLayout {
  int64_t width, plane, of_products, products, zeros, bytes;

  constexpr explicit WinogradLayout(const WinogradConv2dArgs& args) {
    width = (args.channels + 15) / 16 * 16;
    plane = args.kTiles * width + 16;
    of_products = args.kTiles * args.kPanel + 16;
    products = 16 * plane;
    zeros = products + 16 * of_products;
    bytes = (zeros + width) * 4;
  }
};

// Over workers.
PYGEN_CPU_KERNEL(winograd_conv2d, WinogradConv2dArgs)

}  // namespace pygen
