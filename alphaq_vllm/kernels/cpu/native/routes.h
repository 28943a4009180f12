// Which tokens an expert computes, and its activations as the fastest way to multiply wants them.
#pragma once

#include <vector>

#include "operand.h"
#include "workspace.h"

namespace alphaq {

// Routes of an expert that are multiplied with a block at once: their activations stay in the second cache.
constexpr int64_t ROUTES_AT_ONCE = 256;

// The routes of some tokens, expert by expert.
struct Routes {
  // Of each route.
  std::vector<int32_t> token;
  std::vector<int32_t> index;
  std::vector<float> weight;
  struct Piece {
    int32_t expert;
    int32_t first;
    int32_t count;
  };
  // Routes of one expert, ROUTES_AT_ONCE at most, ascending.
  std::vector<Piece> pieces;
  // With routes.
  int64_t experts = 0;

  // All rows, of the one matrix that there is.
  explicit Routes(int64_t rows) : index(rows) {
    for (int64_t i = 0; i < rows; ++i) index[i] = i;
    add_pieces(0, 0, rows);
  }

  // Routes of tokens to top_k experts each; ids below 0 are skipped.
  Routes(const int32_t* ids, const float* weights, int64_t num_tokens, int64_t top_k, int64_t num_experts) {
    std::vector<int32_t> end(num_experts + 1);
    for (int64_t i = 0; i < num_tokens * top_k; ++i) {
      if (ids[i] >= 0) ++end[ids[i] + 1];
    }
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      add_pieces(expert, end[expert], end[expert + 1]);
      end[expert + 1] += end[expert];
    }
    token.resize(end[num_experts]);
    index.resize(token.size());
    weight.resize(token.size());
    for (int64_t i = 0; i < num_tokens * top_k; ++i) {
      if (ids[i] < 0) continue;
      const int32_t route = end[ids[i]]++;
      token[route] = i / top_k;
      index[route] = route;
      weight[route] = weights[i];
    }
  }

  // Digits for activations of a dtype, or HALVES if these are many enough.
  int64_t digits(Dtype dtype, int64_t chosen) const {
    const bool many = (int64_t)index.size() >= FEWEST_IN_HALVES * experts;
    return HAS_TILES && dtype == BFLOAT16 && chosen == 2 && many ? HALVES : chosen;
  }

 private:
  void add_pieces(int32_t expert, int32_t first, int32_t count) {
    experts += count > 0;
    for (int32_t done = 0; done < count; done += ROUTES_AT_ONCE) {
      pieces.push_back({expert, first + done, std::min<int32_t>(count - done, ROUTES_AT_ONCE)});
    }
  }
};

// Rows of x, [rows, columns] of dtype.
struct Source {
  Dtype dtype;
  const void* x;
  int64_t rows;
  int64_t columns;
  int64_t group_size;
};

// What the experts are multiplied with, piece by piece.
class Operands {
 public:
  // rows: of x, for each route. digits: or HALVES, for x of bfloat16.
  Operands(const Threads& threads, const Routes& routes, const Source& x, const std::vector<int32_t>& rows,
           int64_t digits, Workspace& space)
      : routes_(routes), rows_(rows), x_{} {
    if (digits != HALVES) {
      x_ = take_digits(space, x.rows, x.columns, x.group_size, digits);
      quantize_rows(threads, x.dtype, x.x, x.rows, x_);
    }
    if (!HAS_TILES) return;
    struct Tile {
      int64_t piece;
      int64_t index;
    };
    std::vector<Tile> all;
    for (const Routes::Piece& piece : routes.pieces) {
      Tiles tiles(piece.count, x.columns, x.group_size, digits);
      if (in_tiles(piece, digits)) {
        tiles.take(space);
        for (int64_t i = 0; i < Tiles::number(piece.count); ++i) all.push_back({(int64_t)tiles_.size(), i});
      }
      tiles_.push_back(tiles);
    }
    parallel(threads, all.size(), [&](int64_t i) {
      const Routes::Piece& piece = routes.pieces[all[i].piece];
      const Tiles& tiles = tiles_[all[i].piece];
      if (digits == HALVES) {
        tiles.gather((const uint16_t*)x.x, &rows[piece.first], piece.count, all[i].index);
      } else {
        tiles.gather(x_, &rows[piece.first], piece.count, all[i].index);
      }
    });
  }

  Operand operator[](int64_t piece) const {
    const Routes::Piece& routes = routes_.pieces[piece];
    const Tiles* tiles = HAS_TILES && tiles_[piece].bytes ? &tiles_[piece] : nullptr;
    return {x_, &rows_[routes.first], routes.count, tiles};
  }

  // What the constructor takes from the workspace.
  static int64_t bytes(const Routes& routes, int64_t rows, int64_t columns, int64_t group_size, int64_t digits) {
    int64_t total = digits == HALVES ? 0 : digit_bytes(rows, columns, group_size, digits);
    for (const Routes::Piece& piece : routes.pieces) {
      if (in_tiles(piece, digits)) total += Tiles(piece.count, columns, group_size, digits).taken();
    }
    return total;
  }

 private:
  static bool in_tiles(const Routes::Piece& piece, int64_t digits) {
    return HAS_TILES && (digits == HALVES || piece.count >= FEWEST_IN_TILES);
  }

  const Routes& routes_;
  const std::vector<int32_t>& rows_;
  Digits x_;
  std::vector<Tiles> tiles_;
};

// How many blocks of rows make a unit of work, if there are so many of them in all.
inline int64_t blocks_per_unit(int64_t blocks, int64_t threads, int64_t most) {
  return std::clamp<int64_t>(blocks / (threads * 8), 1, most);
}

}  // namespace alphaq
