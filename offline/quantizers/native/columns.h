// The columns of a group while GPTQ quantizes it: see gptq.py and columns.py. Lanes are rows of the matrix.
#pragma once

#include <cstring>
#include <vector>

#include "grids.h"

namespace {

// Vectors of lanes that are worked on at a time, so that a factor is loaded once for them; and rows of a product that
// are computed together, so that columns are loaded once for them. TOGETHER must divide the sizes of groups.
constexpr int WIDE = 4, TOGETHER = LANES == 16 ? 4 : 2;
// What is taken for no more than rounding in a determinant, by its terms: as in columns.py.
constexpr float ROUNDING = 1e-6f;

struct Wide {
  Floats parts[WIDE];
};

// Rows of a matrix that are worked on together.
struct Rows {
  static constexpr int64_t WIDTH = WIDE * LANES;
  int64_t first, count;

  // A value of each; rows that do not exist have another.
  Wide load(const float* from, float instead = 0) const {
    float values[WIDTH];
    std::fill_n(values, WIDTH, instead);
    std::copy_n(from + first, count, values);
    Wide loaded;
    std::memcpy(&loaded, values, sizeof loaded);
    return loaded;
  }

  template <typename T>
  void store(const Wide& wide, T* to) const {
    float values[WIDTH];
    std::memcpy(values, &wide, sizeof wide);
    for (int64_t lane = 0; lane < count; ++lane) to[first + lane] = static_cast<T>(values[lane]);
  }
};

// Calls work with all rows, some at a time.
template <typename Work>
inline void by_rows(int64_t rows, Work work) {
  for (int64_t first = 0; first < rows; first += Rows::WIDTH)
    work(Rows{first, std::min<int64_t>(Rows::WIDTH, rows - first)});
}

// matrix [size, size] times columns.
inline void multiply(const float* matrix, const std::vector<Wide>& columns, std::vector<Wide>& products) {
  const int64_t size = columns.size();
  for (int64_t i = 0; i < size; i += TOGETHER) {
    Wide sums[TOGETHER]{};
    for (int64_t j = 0; j < size; ++j)
      for (int row = 0; row < TOGETHER; ++row)
        for (int part = 0; part < WIDE; ++part)
          sums[row].parts[part] += columns[j].parts[part] * matrix[(i + row) * size + j];
    std::copy_n(sums, TOGETHER, &products[i]);
  }
}

// What all rows of a group share, all [size, size]: factor, of Feedback; to_gradient: makes a gradient of what is left
// of the errors; own: weighs them, as in columns.py.
struct Effects {
  const float *factor, *to_gradient, *own;
  int64_t size;
  // Of own: each row by its diagonal, the sums of rows, and of all.
  std::vector<float> relative, sums;
  float sum = 0;

  Effects(const float* factor, const float* to_gradient, const float* own, int64_t size)
      : factor(factor), to_gradient(to_gradient), own(own), size(size), relative(size * size), sums(size) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        relative[i * size + j] = own[i * size + j] / own[i * size + i];
        sums[i] += own[i * size + j];
      }
      sum += sums[i];
    }
  }
};

// The columns of a group of some rows: as they are, what moves them, and what they become.
struct Columns {
  const Effects& effects;
  const int64_t size, num_bits;
  std::vector<Wide> block, moved, codes;
  // The scales of the rows, and grids, as in Stored; what these mean for codes.
  Wide scale, steps, parts, step, zero;
  // How the loss follows each column, what last moved the others, and room.
  std::vector<Wide> gradient, changes, products;
  // What rounding left of the columns, squared as it counts; what was best of several times.
  Wide loss, least, best_steps, best_parts;
  std::vector<Wide> best_codes, best_changes;
  std::vector<Floats> weight, x;

  Columns(const Effects& effects, int64_t num_bits)
      : effects(effects),
        size(effects.size),
        num_bits(num_bits),
        block(size),
        moved(size),
        codes(size),
        gradient(size),
        changes(size),
        products(size),
        best_codes(size),
        best_changes(size),
        weight(size),
        x(size) {}

  Floats value(int64_t j, int part) const { return (codes[j].parts[part] - zero.parts[part]) * step.parts[part]; }

  Floats error(int64_t j, int part) const { return block[j].parts[part] - value(j, part); }

  // After a change of steps or parts.
  void take_grids() {
    for (int part = 0; part < WIDE; ++part) {
      step.parts[part] = scale.parts[part] * steps.parts[part];
      zero.parts[part] = zero_point(parts.parts[part], num_bits);
    }
  }

  // Finds grids for the columns as moved. Returns whether these are finite.
  bool find_grids(const Attempts& attempts) {
    bool finite = true;
    for (int part = 0; part < WIDE; ++part) {
      for (int64_t j = 0; j < size; ++j) weight[j] = block[j].parts[part] + moved[j].parts[part];
      const Groups groups = normalize(weight.data(), size, x.data());
      for (int64_t lane = 0; lane < LANES; ++lane) finite &= groups.radius[lane] <= __FLT_MAX__;
      const Grid grid = search(groups, spread(all_codes(num_bits) - 1), attempts);
      const Stored best = choose({weight.data(), size, num_bits, scale.parts[part]}, groups, grid);
      steps.parts[part] = best.steps;
      parts.parts[part] = best.parts;
    }
    take_grids();
    return finite;
  }

  // Gives columns codes, from the last to the first, each moved by the changes of those after it. matrix [size, size]:
  // above its diagonal, row j says how they move column j; from(j, part): what that column is else; change(j, part,
  // before, target): what is to move others once it has its code.
  template <typename From, typename Change>
  void round(const float* matrix, From from, Change change) {
    Wide inverse;
    for (int part = 0; part < WIDE; ++part) inverse.parts[part] = 1.0f / step.parts[part];
    const Floats top = spread(all_codes(num_bits) - 1);
    const auto finish = [&](int64_t j, const Wide& target) {
      for (int part = 0; part < WIDE; ++part) {
        const Floats before = value(j, part);
        const Floats exact = target.parts[part] * inverse.parts[part] + zero.parts[part];
        codes[j].parts[part] = nearest(clamped(exact, 0, top));
        changes[j].parts[part] = change(j, part, before, target.parts[part]);
      }
    };
    // Two columns at a time share the changes that are loaded.
    for (int64_t j = size - 2; j >= 0; j -= 2) {
      const float *of_first = matrix + j * size, *of_second = of_first + size;
      Wide first, second;
      for (int part = 0; part < WIDE; ++part) {
        first.parts[part] = from(j, part);
        second.parts[part] = from(j + 1, part);
      }
      for (int64_t i = j + 2; i < size; ++i) {
        for (int part = 0; part < WIDE; ++part) {
          first.parts[part] += changes[i].parts[part] * of_first[i];
          second.parts[part] += changes[i].parts[part] * of_second[i];
        }
      }
      finish(j + 1, second);
      for (int part = 0; part < WIDE; ++part) first.parts[part] += changes[j + 1].parts[part] * of_first[j + 1];
      finish(j, first);
    }
  }

  // Rounds the columns on their grids.
  void round() {
    loss = Wide{};
    const auto from = [&](int64_t j, int part) { return block[j].parts[part] + moved[j].parts[part]; };
    const auto change = [&](int64_t j, int part, Floats, Floats target) {
      // Columns before the group cannot make up for it. The diagonal of factor is 1, so that of to_gradient has costs.
      const Floats left = target - value(j, part);
      loss.parts[part] += left * left * effects.to_gradient[j * size + j];
      return error(j, part);
    };
    round(effects.factor, from, change);
  }

  // Rounds the columns on the grids around theirs, too, up to so many steps and parts away, and keeps the best.
  void round_around(int64_t reach) {
    round();
    keep();
    const Wide steps_here = steps, parts_here = parts;
    for (int64_t more = -reach; more <= reach; ++more) {
      for (int64_t higher = -reach; higher <= reach; ++higher) {
        if (!more && !higher) continue;
        for (int part = 0; part < WIDE; ++part) {
          steps.parts[part] = clamped(steps_here.parts[part] + static_cast<float>(more), 1, spread(STEPS));
          parts.parts[part] =
              clamped(parts_here.parts[part] + static_cast<float>(higher), FIRST_ZERO, spread(LAST_ZERO));
        }
        take_grids();
        round();
        keep_if_better();
      }
    }
    steps = best_steps;
    parts = best_parts;
    codes = best_codes;
    changes = best_changes;
    take_grids();
  }

  void keep() {
    least = loss;
    best_steps = steps;
    best_parts = parts;
    best_codes = codes;
    best_changes = changes;
  }

  void keep_if_better() {
    for (int part = 0; part < WIDE; ++part) {
      const Ints better = loss.parts[part] < least.parts[part];
      const auto take = [&](const Wide& from, Wide& to) {
        to.parts[part] = better ? from.parts[part] : to.parts[part];
      };
      take(loss, least);
      take(steps, best_steps);
      take(parts, best_parts);
      for (int64_t j = 0; j < size; ++j) {
        take(codes[j], best_codes[j]);
        take(changes[j], best_changes[j]);
      }
    }
  }

  // Makes rounded columns and their grids better.
  void improve(int64_t times) {
    // Columns before the group will make up for what they can of its errors: the rest counts.
    multiply(effects.factor, changes, products);
    for (int64_t j = 0; j < size; ++j)
      for (int part = 0; part < WIDE; ++part) products[j].parts[part] += moved[j].parts[part];
    multiply(effects.to_gradient, products, gradient);
    for (int64_t i = 0; i < times; ++i) {
      fit_grids();
      fit_codes();
    }
    fit_grids();
  }

  void fit_codes() {
    const auto from = [&](int64_t j, int part) {
      return value(j, part) + gradient[j].parts[part] / effects.own[j * size + j];
    };
    const auto change = [&](int64_t j, int part, Floats before, Floats) { return before - value(j, part); };
    round(effects.relative.data(), from, change);
    multiply(effects.own, changes, products);
    for (int64_t j = 0; j < size; ++j)
      for (int part = 0; part < WIDE; ++part) gradient[j].parts[part] += products[j].parts[part];
  }

  void fit_grids() {
    multiply(effects.own, codes, products);
    for (int part = 0; part < WIDE; ++part) fit_grids(part);
    take_grids();
  }

  void fit_grids(int part) {
    // The least squares of the change codes * slope + shift.
    Floats a{}, b{}, p{}, q{};
    const float c = effects.sum;
    for (int64_t j = 0; j < size; ++j) {
      const Floats code = codes[j].parts[part], of_gradient = gradient[j].parts[part];
      a += products[j].parts[part] * code;
      b += code * effects.sums[j];
      p += of_gradient * code;
      q += of_gradient;
    }
    const Floats now = step.parts[part], offset = zero.parts[part] * now, unit = scale.parts[part];
    const Floats determinant = a * c - b * b, exact = now + (p * c - q * b) / determinant;
    const Ints solvable = (determinant > ROUNDING * a * c) & (exact > 0.0f);
    const Floats lower = floored(clamped(exact / unit, 0, spread(STEPS + 1)));
    Floats most{}, slope{}, shift{};
    for (const Floats candidate : {clamped(lower, 1, spread(STEPS)), clamped(lower + 1.0f, 1, spread(STEPS))}) {
      const Floats new_step = candidate * unit, slope_of = new_step - now;
      // The best shift beside this slope.
      const Floats best_zero = (offset - (q - b * slope_of) / c) / new_step;
      const Floats stored = nearest_parts(best_zero, num_bits);
      const Floats shift_of = offset - zero_point(stored, num_bits) * new_step;
      const Floats loss = a * slope_of * slope_of + 2.0f * b * slope_of * shift_of + c * shift_of * shift_of;
      const Floats gain = 2.0f * (p * slope_of + q * shift_of) - loss;
      // NaN of what overflows is not better.
      const Ints better = solvable & (gain > most);
      most = better ? gain : most;
      slope = better ? slope_of : slope;
      shift = better ? shift_of : shift;
      steps.parts[part] = better ? candidate : steps.parts[part];
      parts.parts[part] = better ? stored : parts.parts[part];
    }
    for (int64_t j = 0; j < size; ++j)
      gradient[j].parts[part] -= products[j].parts[part] * slope + shift * effects.sums[j];
  }
};

}  // namespace
