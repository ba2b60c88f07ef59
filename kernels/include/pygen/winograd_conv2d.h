// winograd_conv2d: a 3x3 convolution of stride 1, padded by 1, by tiles (Lavin & Gray 2015): what the outputs of a tile
// see is transformed and multiplied by the transform of the weight. For 4x4 outputs these are 36 products in the place
// of 144, for 2x2 they are 16 in the place of 36.
//
// Products of many tiles at once are those of matrices, (tiles, channels) (channels, outputs), one of each plane.
// Weights are transformed on the way: their transforms are 4 times as large, and 8 times where they are halves.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"
#include "pygen/tile_product.h"

namespace pygen {

struct WinogradConv2dArgs {
  static constexpr int64_t kMostTiles = 64;  // of a block
  static constexpr int64_t kChannels = 64;   // that are multiplied at once
  static constexpr int64_t kPanel = 64;      // outputs that are computed at once

  int64_t batch, height, width, channels, outputs;
  Operand x, out;      // of one dtype; strides of batch, rows, columns: channels lie side by side
  const void* weight;  // of x's dtype: (panels, channels, 9, kPanel)
  const void* bias;    // likewise, or null
  TileProduct product;
  char* memory;  // 64-byte aligned: of each worker, WinogradLayout(args).bytes
  int64_t workers;
  int64_t block, groups;  // of tiles and of panels: of both are the units of work

  // Outputs of a tile in each direction. Of a float32 the larger tiles lose a few more of the last bits than the
  // smaller, which only the sums of a direct convolution of many channels lose too.
  constexpr int side() const { return x.dtype == DType::kFloat32 && channels < 256 ? 2 : 4; }

  constexpr int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  constexpr int64_t rows_of_tiles() const { return (height + side() - 1) / side(); }
  constexpr int64_t columns_of_tiles() const { return (width + side() - 1) / side(); }
  constexpr int64_t tiles() const { return batch * rows_of_tiles() * columns_of_tiles(); }
  constexpr int64_t blocks() const { return (tiles() + block - 1) / block; }
};

// A worker's memory, in floats: of some channels a block's transformed tiles (planes, tiles, kChannels) and a panel's
// transformed weight (planes, kChannels, kPanel); and the products of a group (panels, planes, tiles, kPanel). Planes
// lie a cache line apart, or they would fall into the same sets.
struct WinogradLayout {
  int64_t planes, tile_plane, weight_plane, product_plane, weight, products, bytes;

  constexpr explicit WinogradLayout(const WinogradConv2dArgs& args) {
    using Args = WinogradConv2dArgs;
    planes = (args.side() + 2) * (args.side() + 2);
    tile_plane = args.block * Args::kChannels + 16;
    weight_plane = Args::kChannels * Args::kPanel + 16;
    product_plane = args.block * Args::kPanel + 16;
    weight = planes * tile_plane;
    products = weight + planes * weight_plane;
    bytes = (products + (args.panels() + args.groups - 1) / args.groups * planes * product_plane) * 4;
  }
};

// Over workers.
PYGEN_CPU_KERNEL(winograd_conv2d, WinogradConv2dArgs)

}  // namespace pygen
