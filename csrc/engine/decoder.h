// The decoder, one position of all live hypotheses at a time, with a cache of earlier positions.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "engine/buffer.h"
#include "engine/encoder.h"
#include "engine/model.h"

namespace transformer_ext::engine {

// A live hypothesis, as the decoder sees it.
struct Row {
  int32_t sentence;
  int32_t parent;  // its row in the step before; not read in the first step
  int32_t token;   // its newest
};

// Keys and values of position t of all rows that were live then lie in one block that is never
// moved. A row knows its positions by pointers into the blocks; rows with a common beginning share
// them, and a new order of the beam, or the end of a sentence, copies pointers only.
class Decoder {
 public:
  // Must be called before the first step of a batch. Both must outlive it. `attention_layer`, from
  // 0, is the one whose attention to the sources is kept; -1: none.
  void start(const Model& model, const EncodedSources& sources, int64_t attention_layer = -1);

  // The decoder's states [rows, width] after the rows' newest tokens, ready for the generator.
  // Rows of a sentence stand together. Valid until the next step.
  const float* step(const std::vector<Row>& rows, PositionTables& positions, Parallel& parallel);

  // What a row of the last step attended to: probabilities over its source's tokens, averaged over
  // the heads of the layer given to start().
  const float* attention(int64_t row) const { return attention_.data() + row * longest_source_; }
  int64_t bytes() const;

 private:
  // The rows of a sentence.
  struct Group {
    int64_t begin;
    int64_t end;
    int64_t shared;  // positions, from the first on, that they have in common
  };

  void advance_paths(const std::vector<Row>& rows);
  void find_groups(const std::vector<Row>& rows);

  const Model* model_ = nullptr;
  const EncodedSources* sources_ = nullptr;
  int64_t attention_layer_ = -1;
  int64_t longest_source_ = 0;
  int64_t position_ = 0;
  int64_t block_stride_ = 0;                // bytes of a row in a block: [layers][2][kv_width]
  std::vector<Buffer<char>> blocks_;        // by position
  Buffer<const void*> paths_;               // [rows][position_ + 1], into the blocks
  Buffer<const void*> earlier_paths_;       // of the step before
  std::vector<Group> groups_;               // of the step
  std::vector<const void*> source_keys_;    // of each source token, in the first layer
  std::vector<int64_t> source_keys_begin_;  // by sentence
  std::vector<int32_t> ids_;
  std::vector<int32_t> row_positions_;
  Buffer<float> x_;
  Buffer<float> normed_;
  Buffer<float> projected_;
  Buffer<float> attended_;
  Buffer<float> inner_;
  Buffer<float> attention_;  // [rows][longest_source_]
};

}  // namespace transformer_ext::engine
