#include <vector>

#include "ops.h"
#include "parallel.h"
#include "product.h"

namespace v05::cpu {

namespace {

constexpr int64_t kBlockRows = 96;           // of packed strips that stay in the L2 cache, beside 512 KiB of columns
constexpr int64_t kWorkPerThread = 1 << 20;  // multiplications

template <class Unit>
constexpr int64_t block_columns = (int64_t(1) << 19) * kPerUnit<Unit> / (kDepth * int64_t(sizeof(Unit)));

// out [rows, columns] = or += left [rows, depth] times right [columns, depth], for columns begin to end.
template <class L, class R, class Tile, bool kShuffles>
struct Product {
  using Wide = typename Tile::Wide;
  using Unit = typename Tile::Unit;
  static constexpr int64_t kBlockColumns = block_columns<Unit>;

  static V05_INLINE void run(Matrix<const L> left, Matrix<const R> right, int64_t depth, Matrix<Wide> out, bool adds,
                             Unit* scratch) {
    Unit *packed_right = scratch, *packed_left = scratch + kDepth * (kBlockColumns + Tile::kColumns);
    for (int64_t j = 0; j < out.columns; j += kBlockColumns)
      for (int64_t k = 0; k < depth; k += kDepth) {
        int64_t columns = std::min(kBlockColumns, out.columns - j), piece = std::min(kDepth, depth - k);
        int64_t units = (piece + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
        pack<R>(right, j, columns, k, piece, Tile::kColumns, packed_right);
        for (int64_t i = 0; i < out.rows; i += kBlockRows) {
          int64_t rows = std::min(kBlockRows, out.rows - i);
          pack<L>(left, i, rows, k, piece, Tile::kRows, packed_left);
          for (int64_t jj = 0; jj < columns; jj += Tile::kColumns)
            for (int64_t ii = 0; ii < rows; ii += Tile::kRows) {
              alignas(64) Wide tile[Tile::kRows * Tile::kColumns];
              sum_strips(packed_left + ii * units, packed_right + jj * units, units, tile);
              store(tile, std::min(Tile::kRows, rows - ii), std::min(Tile::kColumns, columns - jj),
                    out.data + (i + ii) * out.row_stride + j + jj, out.row_stride, adds || k > 0);
            }
        }
      }
  }

  // Short runs are added up apart, which halves the rounding error of one long run.
  static V05_INLINE void sum_strips(const Unit* a, const Unit* b, int64_t units, Wide* tile) {
    alignas(64) Wide next[Tile::kRows * Tile::kColumns];
    for (int64_t k = 0; k < units; k += kRun) {
      Tile::run(a + k * Tile::kRows, b + k * Tile::kColumns, std::min(kRun, units - k), k > 0 ? next : tile);
      for (int64_t i = 0; k > 0 && i < Tile::kRows * Tile::kColumns; ++i) tile[i] += next[i];
    }
  }

  template <class T>
  static V05_INLINE void pack(Matrix<const T> x, int64_t first, int64_t rows, int64_t k, int64_t piece, int64_t width,
                              Unit* out) {
    int64_t units = (piece + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
    for (int64_t r = 0; r < rows; r += width)
      pack_strip<kShuffles>(x.data + (first + r) * x.row_stride + k * x.column_stride, x.row_stride, x.column_stride,
                            std::min(width, rows - r), piece, width, out + r * units);
  }

  static V05_INLINE void store(const Wide* tile, int64_t rows, int64_t columns, Wide* out, int64_t stride, bool adds) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        out[r * stride + c] = tile[r * Tile::kColumns + c] + (adds ? out[r * stride + c] : Wide(0));
  }
};

template <class Tile>
using Scratch = std::vector<typename Tile::Unit>;

template <class Tile>
Scratch<Tile> make_scratch() {
  return Scratch<Tile>(kDepth * (block_columns<typename Tile::Unit> + Tile::kColumns + kBlockRows + Tile::kRows));
}

template <class L, class R, class Wide>
void product_piece(Matrix<const L> left, Matrix<const R> right, int64_t depth, Matrix<Wide> out, bool adds) {
#if V05_X86
  if constexpr (std::is_same_v<R, BFloat16>)
    if (has_bfloat16()) {
      auto scratch = make_scratch<PairTile>();
      return run_avx512<Product<L, R, PairTile, true>>(left, right, depth, out, adds, scratch.data());
    }
  if (has_avx512()) {
    using Tile = WideTile<Wide, 12, 2>;
    auto scratch = make_scratch<Tile>();
    return run_avx512<Product<L, R, Tile, true>>(left, right, depth, out, adds, scratch.data());
  }
  if (has_avx2()) {
    using Tile = WideTile<Wide, 6, 1>;
    auto scratch = make_scratch<Tile>();
    return run_avx2<Product<L, R, Tile, false>>(left, right, depth, out, adds, scratch.data());
  }
#endif
  using Tile = WideTile<Wide, 2, 1>;
  auto scratch = make_scratch<Tile>();
  Product<L, R, Tile, false>::run(left, right, depth, out, adds, scratch.data());
}

}  // namespace

template <class L, class R>
void matrix_product(const Matrix<const L>& left, const Matrix<const R>& right, int64_t depth,
                    const Matrix<WideOf<R>>& out, bool adds) {
  int64_t work = out.rows * out.columns * std::max<int64_t>(depth, 1);
  if (out.columns >= out.rows) {
    parallel_for(out.columns, work, kWorkPerThread, [&](int64_t begin, int64_t end) {
      Matrix<const R> some = right;
      Matrix<WideOf<R>> piece = out;
      some.data += begin * right.row_stride, piece.data += begin, piece.columns = end - begin;
      product_piece(left, some, depth, piece, adds);
    });
  } else {
    parallel_for(out.rows, work, kWorkPerThread, [&](int64_t begin, int64_t end) {
      Matrix<const L> some = left;
      Matrix<WideOf<R>> piece = out;
      some.data += begin * left.row_stride, piece.data += begin * out.row_stride, piece.rows = end - begin;
      product_piece(some, right, depth, piece, adds);
    });
  }
}

// The entropy of slices together is sum_b w_b (H_b - log w_b), in which no term is negative.
template <class Wide>
void join_slices(const std::array<const Wide*, 3>& fields, int64_t slices, int64_t rows, const double* temperatures,
                 double temperature, Wide* joined) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (int64_t r = 0; r < rows; ++r) {
    double inverse = 1 / (temperatures ? temperatures[r] : temperature), largest = -kInfinity, total = 0, weighted = 0;
    for (int64_t s = 0; s < slices; ++s) largest = std::max(largest, double(fields[0][s * rows + r]));
    for (int64_t s = 0; s < slices && largest > -kInfinity; ++s) {
      double share = (fields[0][s * rows + r] - largest) * inverse + fields[1][s * rows + r], size = std::exp(share);
      total += size;
      weighted += size > 0 ? size * (fields[2][s * rows + r] - share) : 0;
    }
    double log_sum = total > 0 ? std::log(total) : 0;
    joined[r] = Wide(largest);
    joined[rows + r] = Wide(log_sum);
    joined[2 * rows + r] = total > 0 ? Wide(std::max(0.0, weighted / total + log_sum)) : Wide(0);
  }
}

template void join_slices<float>(const std::array<const float*, 3>&, int64_t, int64_t, const double*, double, float*);
template void join_slices<double>(const std::array<const double*, 3>&, int64_t, int64_t, const double*, double,
                                  double*);

#define V05_INSTANTIATE(L, R)                                                                       \
  template void matrix_product<L, R>(const Matrix<const L>&, const Matrix<const R>&, int64_t depth, \
                                     const Matrix<WideOf<R>>&, bool);
V05_INSTANTIATE(float, float)
V05_INSTANTIATE(double, double)
V05_INSTANTIATE(BFloat16, BFloat16)
V05_INSTANTIATE(Float16, Float16)
V05_INSTANTIATE(float, BFloat16)
V05_INSTANTIATE(float, Float16)

}  // namespace v05::cpu
