// The decoder, with a cache of earlier positions: one position of all live hypotheses at a time, or
// given tokens all at once.
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
  int32_t parent;  // its row in the step before; in the first step the number of its sentence
  int32_t token;   // its newest
};

// Tokens of a sentence that follow one another.
struct Span {
  int32_t sentence;
  const int32_t* tokens;
  int64_t count;
};

// Keys and values of all rows of a call lie in one block that is never moved. A row knows its
// positions by pointers into the blocks; rows with a common beginning share them, and a new order
// of the beam, or the end of a sentence, copies pointers only. Sentences may differ in length.
//
// A row's states have the same bits whether its tokens came step by step or at once, in one call or
// in several: products and norms work row by row, and cached attention gives a row what it gives it
// alone. An attention kernel for whole sequences would be faster at given tokens, and would add up
// in another order; of GPT-2 small's 256 tokens attention is 3 % of the operations.
class Decoder {
 public:
  // Must be called before anything else for each batch. The model must outlive it, and so must the
  // sources, which a model without attention to sources has not (null). `attention_layer`, from 0,
  // is the one whose attention to the sources is kept; -1: none.
  void start(const Model& model, const EncodedSources* sources, int64_t sentences,
             int64_t attention_layer = -1);

  // The decoder's states [rows, width] after the rows' newest tokens, ready for the generator.
  // Rows of a sentence stand together. Valid until the next call.
  const float* step(const std::vector<Row>& rows, PositionTables& positions, Parallel& parallel);

  // The same after each token of the spans, before the first step; a sentence has one at most.
  const float* extend(const std::vector<Span>& spans, PositionTables& positions,
                      Parallel& parallel);

  // What a row of the last call attended to: probabilities over its source's tokens, averaged over
  // the heads of the layer given to start().
  const float* attention(int64_t row) const { return attention_.data() + row * longest_source_; }
  int64_t bytes() const;

 private:
  // Rows of a sentence that attend together.
  struct Group {
    int32_t sentence;
    bool causal;  // they are positions one after the other
    int64_t begin;
    int64_t end;
    int64_t length;                // positions that the last row sees
    int64_t shared;                // of these, from the first on, that all have in common
    const void* const* positions;  // of the first row
    int64_t stride;                // from one row's pointers to the next row's
  };

  // Makes room for the keys and values of so many rows.
  char* next_block(int64_t rows);
  // The positions of row r of the rows that come next: those of a row before, and `added` of the
  // block.
  void add_path(int64_t parent, const char* block, int64_t added);
  void swap_paths(int64_t rows, int64_t pointers);
  // For the rows of groups_, with ids_ and row_positions_.
  const float* run(char* block, PositionTables& positions, Parallel& parallel);
  void attend_to_positions(int64_t layer, char* block, const float* rotary, Parallel& parallel);
  void attend_to_sources(int64_t layer, Parallel& parallel);

  const Model* model_ = nullptr;
  const EncodedSources* sources_ = nullptr;
  int64_t attention_layer_ = -1;
  int64_t longest_source_ = 0;
  int64_t block_stride_ = 0;  // bytes of a row in a block: [layers][2][kv_width]
  std::vector<Buffer<char>> blocks_;
  size_t blocks_used_ = 0;
  Buffer<const void*> paths_;         // of the rows, one behind the other
  std::vector<int64_t> path_begins_;  // [rows + 1]
  Buffer<const void*> earlier_paths_;
  std::vector<int64_t> earlier_begins_;
  std::vector<Group> groups_;
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
