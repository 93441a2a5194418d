// Hydra: language models with HydraLoRA adapters, and the HydraLoRA operator.
//
// Generated from hydra-runtime/ffi/src by cbindgen. README.md beside this folder has the rules that all functions share.

#ifndef HYDRA_H
#define HYDRA_H

#include <stddef.h>
#include <stdint.h>

// The CPU, as `hydra_model_options.device`.
#define HYDRA_CPU -1

// No loss is taken at a position with this target.
#define HYDRA_NO_TARGET UINT32_MAX

// The head of a sequence without a label: under the label gate all heads have the same weight.
#define HYDRA_NO_LORA_HEAD UINT32_MAX

// The version of this interface. A program compiled with another HYDRA_ABI_VERSION than `hydra_abi_version` returns
// can't use the library.
#define HYDRA_ABI_VERSION 1

// What a function returns. `hydra_last_error` has the text of an error.
enum hydra_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Done.
  HYDRA_STATUS_OK = 0,
  // An argument is wrong: null, out of range, of another length, not UTF-8, or not a number.
  HYDRA_STATUS_INVALID_ARGUMENT = 1,
  // A handle that was never given out, has been freed, or is of another kind.
  HYDRA_STATUS_INVALID_HANDLE = 2,
  // Another call is using the generator or the trainer.
  HYDRA_STATUS_BUSY = 3,
  // The result doesn't fit the memory that was given for it. How much it takes has been written.
  HYDRA_STATUS_BUFFER_TOO_SMALL = 4,
  // The operating system refused to read or write a file.
  HYDRA_STATUS_IO = 5,
  // A file isn't what it should be.
  HYDRA_STATUS_FORMAT = 6,
  // Memory could not be had.
  HYDRA_STATUS_OUT_OF_MEMORY = 7,
  // The text is longer than the model's context, a pass or a cache has room for.
  HYDRA_STATUS_TOO_LONG = 8,
  // The adapter doesn't fit the model or the call.
  HYDRA_STATUS_WRONG_ADAPTER = 9,
  // A loss, a gradient or a logit is infinite or not a number.
  HYDRA_STATUS_NOT_FINITE = 10,
  // The work was cancelled.
  HYDRA_STATUS_CANCELLED = 11,
  // The device isn't there or has failed.
  HYDRA_STATUS_DEVICE = 12,
  // A mistake inside the library, which is to be reported. The object that was in use is to be freed.
  HYDRA_STATUS_PANIC = 13,
  // An error that no other code names.
  HYDRA_STATUS_OTHER = 14,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum hydra_status hydra_status;
#else
typedef int32_t hydra_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What matrices are multiplied in; sums are f32.
enum hydra_precision
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // f32 throughout.
  HYDRA_PRECISION_F32 = 0,
  // The operands of large products are rounded to bf16.
  HYDRA_PRECISION_BF16 = 1,
  // Activations in eight bits beside weights in GGUF's block formats, other products in f32; without training.
  HYDRA_PRECISION_Q8 = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum hydra_precision hydra_precision;
#else
typedef int32_t hydra_precision;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How matrices A are shared.
enum hydra_method
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // One A, a B for each head.
  HYDRA_METHOD_HYDRA = 0,
  // One A, one B.
  HYDRA_METHOD_LORA = 1,
  // An A and a B for each head.
  HYDRA_METHOD_SPLIT = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum hydra_method hydra_method;
#else
typedef int32_t hydra_method;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What weighs the heads.
enum hydra_gate
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Softmax of a learned router.
  HYDRA_GATE_ROUTER = 0,
  // Each sequence, or in the operator each token, names its head.
  HYDRA_GATE_LABEL = 1,
  // 1/N for each of N heads.
  HYDRA_GATE_UNIFORM = 2,
  // 1 for each head.
  HYDRA_GATE_ONE = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum hydra_gate hydra_gate;
#else
typedef int32_t hydra_gate;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A linear layer of a block, as a bit of `hydra_adapter_options.targets`.
enum hydra_projection
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Queries.
  HYDRA_PROJECTION_Q = 1,
  // Keys.
  HYDRA_PROJECTION_K = 2,
  // Values.
  HYDRA_PROJECTION_V = 4,
  // The attention's output.
  HYDRA_PROJECTION_O = 8,
  // The feed-forward's gate.
  HYDRA_PROJECTION_GATE = 16,
  // The feed-forward's input.
  HYDRA_PROJECTION_UP = 32,
  // The feed-forward's output.
  HYDRA_PROJECTION_DOWN = 64,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum hydra_projection hydra_projection;
#else
typedef uint32_t hydra_projection;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Why a text ended.
enum hydra_finish
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The model ended it.
  HYDRA_FINISH_END_OF_TEXT = 0,
  // A stop text appeared.
  HYDRA_FINISH_STOP = 1,
  // It has as many tokens as were asked for.
  HYDRA_FINISH_MAX_TOKENS = 2,
  // The model's context is full.
  HYDRA_FINISH_CONTEXT = 3,
  // The callback ended it.
  HYDRA_FINISH_CALLBACK = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum hydra_finish hydra_finish;
#else
typedef int32_t hydra_finish;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How values are stored. The numbers are those of ggml_type.
enum hydra_type
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // IEEE single precision.
  HYDRA_TYPE_F32 = 0,
  // IEEE half precision.
  HYDRA_TYPE_F16 = 1,
  // Blocks of 32 values of 4 bits, with a scale.
  HYDRA_TYPE_Q4_0 = 2,
  // Blocks of 32 values of 4 bits, with a scale and a minimum.
  HYDRA_TYPE_Q4_1 = 3,
  // Blocks of 32 values of 5 bits, with a scale.
  HYDRA_TYPE_Q5_0 = 6,
  // Blocks of 32 values of 5 bits, with a scale and a minimum.
  HYDRA_TYPE_Q5_1 = 7,
  // Blocks of 32 values of 8 bits, with a scale.
  HYDRA_TYPE_Q8_0 = 8,
  // Blocks of 256 values of 2 bits.
  HYDRA_TYPE_Q2_K = 10,
  // Blocks of 256 values of 3 bits.
  HYDRA_TYPE_Q3_K = 11,
  // Blocks of 256 values of 4 bits.
  HYDRA_TYPE_Q4_K = 12,
  // Blocks of 256 values of 5 bits.
  HYDRA_TYPE_Q5_K = 13,
  // Blocks of 256 values of 6 bits.
  HYDRA_TYPE_Q6_K = 14,
  // Blocks of 32 values of 4 bits on an uneven scale, with a scale.
  HYDRA_TYPE_IQ4_NL = 20,
  // Blocks of 256 values of 4 bits on an uneven scale.
  HYDRA_TYPE_IQ4_XS = 23,
  // bfloat16.
  HYDRA_TYPE_BF16 = 30,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum hydra_type hydra_type;
#else
typedef int32_t hydra_type;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Kind and sizes of a new adapter.
typedef struct hydra_adapter_options {
  // A hydra_method.
  int32_t method;
  // A hydra_gate.
  int32_t gate;
  // Rank of each head.
  size_t rank;
  // Number of heads.
  size_t lora_heads;
  // The heads' sum is scaled by alpha / rank.
  float alpha;
  // Probability of dropping a value of A's input in training.
  float dropout;
  // Probability of dropping a value of the mixed heads in training.
  float head_dropout;
  // The router's logits are divided by it. Under any other gate 1.
  float temperature;
  // Only so many of a token's largest logits take part; 0 for all. Under any gate but the router's 0.
  size_t top_k;
  // Weight of the load-balancing loss in training; 0 for none.
  float load_balance;
  // The adapted layers: hydra_projection values, or-ed.
  uint32_t targets;
} hydra_adapter_options;

// A model: frozen weights and a tokenizer. 0 is no model.
typedef uint64_t hydra_model;

// An adapter that is attached to a model. 0 is no adapter.
typedef uint64_t hydra_adapter;

// A sequence that grows token by token, with its key-value cache. 0 is no generator.
typedef uint64_t hydra_generator;

// How to generate.
typedef struct hydra_generate_options {
  // The adapter, which is attached to the model; 0 for none.
  hydra_adapter adapter;
  // The most tokens to write; the model's context limits it, too.
  size_t max_tokens;
  // Draws from softmax(logits / temperature); 0 takes the likeliest token each time.
  float temperature;
  // Draws from this many of the likeliest tokens, and from others as likely as the last of them; 0 draws from all.
  size_t top_k;
  // Draws from the likeliest of these that together have this probability, above 0 and at most 1.
  float top_p;
  // Draws from those of these that have at least this share of the likeliest one's probability, from 0 to 1.
  float min_p;
  // Divides positive logits of tokens in the prompt and the text, and multiplies negative ones; above 0, 1 for no penalty.
  float repetition_penalty;
  // Taken from the logit of each token in the text; 0 for no penalty.
  float presence_penalty;
  // The same, for each time that the text has it.
  float frequency_penalty;
  // The same seed draws the same text.
  uint64_t seed;
  // `stop_count` texts; the text ends before the first that appears. Null without any.
  const char *const *stop;
  // Number of `stop` texts.
  size_t stop_count;
} hydra_generate_options;

// Takes a piece of the text as it is generated: `len` bytes of whole UTF-8 characters, and a zero byte after them, which
// are valid during the call. `user` is what the caller of hydra_generate gave. Returns 0 to go on; anything else ends the
// text. It must not throw or jump out.
typedef int32_t (*hydra_text_callback)(const char *text, size_t len, void *user);

// What came of a generation.
typedef struct hydra_generation {
  // Tokens that were drawn, without the one that ended the text.
  size_t tokens;
  // A hydra_finish.
  int32_t finish;
} hydra_generation;

// A turn of a conversation. Both texts end with a zero byte.
typedef struct hydra_message {
  // "system", "user", "assistant", or what else the model's template knows.
  const char *role;
  // The text.
  const char *content;
} hydra_message;

// How to run a model.
typedef struct hydra_model_options {
  // HYDRA_CPU, or the number of an NVIDIA GPU from 0 on if the library was built for CUDA.
  int32_t device;
  // Threads of the CPU; 0 for one a core.
  uint32_t threads;
  // A hydra_precision; a GPU ignores it.
  int32_t precision;
} hydra_model_options;

// A file in memory.
typedef struct hydra_file {
  // Its name in the folder, "config.json" say.
  const char *name;
  // Its content.
  const uint8_t *bytes;
  // Bytes of its content.
  size_t len;
} hydra_file;

// A model's sizes.
typedef struct hydra_model_info {
  // Entries of the vocabulary, and the number of logits.
  size_t vocab;
  // Width of the residual stream.
  size_t d_model;
  // Width of the feed-forward.
  size_t d_ffn;
  // Blocks.
  size_t layers;
  // Query heads.
  size_t n_heads;
  // Key and value heads.
  size_t kv_heads;
  // Positions that the model was made for.
  size_t context;
} hydra_model_info;

// A frozen linear layer and its adapter. Matrices are row-major.
typedef struct hydra_layer {
  // Columns of x.
  size_t d_in;
  // Columns of y.
  size_t d_out;
  // W [d_out, d_in], in the format `weight_type`, at any alignment.
  const void *weight;
  // Bytes of `weight`.
  size_t weight_bytes;
  // A hydra_type.
  int32_t weight_type;
  // What is multiplied in: HYDRA_TYPE_F32, or HYDRA_TYPE_BF16 with sums in f32.
  int32_t product_type;
  // Rank of each head. 0: there is no adapter, and what follows isn't read.
  size_t rank;
  // Number of heads, N.
  size_t lora_heads;
  // Not 0: each head has an A of its own.
  int32_t per_head_a;
  // A hydra_gate. Only HYDRA_GATE_ROUTER has the router's rows R.
  int32_t gate;
  // The router's logits are divided by it; 1 as published.
  float temperature;
  // Only this many of a token's largest logits take part; 0 for all.
  size_t top_k;
  // alpha / rank.
  float scale;
  // A over R: [a_rows + N with a router, d_in], where a_rows is rank, or N · rank with an A for each head.
  const float *a;
  // Values of `a`.
  size_t a_len;
  // B [d_out, N · rank]: head e has columns e · rank to (e + 1) · rank.
  const float *b;
  // Values of `b`.
  size_t b_len;
} hydra_layer;

// A backward pass. Its x, labels and dropout are the forward pass's.
typedef struct hydra_backward_args {
  // Rows of x and y.
  size_t tokens;
  // Of x, dy and dx: HYDRA_TYPE_F32 or HYDRA_TYPE_BF16.
  int32_t element;
  // The gradient of y, [tokens, d_out].
  const void *dy;
  // [tokens, d_in].
  const void *x;
  // What the forward pass wrote. Not read without an adapter.
  const float *adapter_state;
  // The gradient of x, [tokens, d_in], written; null if it isn't needed.
  void *dx;
  // The gradient of A over R, of the size of `a`, added to; null together with `db` if it isn't needed.
  float *da;
  // The gradient of B, of the size of `b`, added to.
  float *db;
  // As in the forward pass.
  const uint32_t *labels;
  // As in the forward pass.
  float dropout;
  // As in the forward pass.
  uint64_t dropout_seed;
  // Weight of the load-balancing loss, whose gradient is added to the router's; 0 for none.
  float load_balance;
} hydra_backward_args;

// One of the threads that compute an operation together.
typedef struct hydra_thread {
  // This thread, from 0 on.
  size_t ith;
  // Number of threads.
  size_t nth;
  // Memory of this thread alone, best aligned to 64 bytes; its content doesn't matter.
  float *scratch;
  // Floats of `scratch`: at least what hydra_forward_scratch or hydra_backward_scratch say.
  size_t scratch_len;
} hydra_thread;

// A forward pass: y = x Wᵀ + scale · Σ gate_e (x Aᵀ) B_eᵀ.
typedef struct hydra_forward_args {
  // Rows of x and y.
  size_t tokens;
  // Of x and y: HYDRA_TYPE_F32 or HYDRA_TYPE_BF16.
  int32_t element;
  // [tokens, d_in].
  const void *x;
  // [tokens, d_out], written.
  void *y;
  // What a backward pass needs: [tokens, a_rows + N], written; null if it isn't needed.
  float *adapter_state;
  // For HYDRA_GATE_LABEL: each token's head, or HYDRA_NO_LORA_HEAD.
  const uint32_t *labels;
  // Probability of dropping a value of A's input; 0 outside of training.
  float dropout;
  // Chooses what is dropped.
  uint64_t dropout_seed;
} hydra_forward_args;

// What stays the same through a run.
typedef struct hydra_train_options {
  // The most tokens in one pass over the model; no sequence may be longer. Memory grows with it.
  size_t max_tokens;
  // Gradients are clipped to this global norm; 0 for no clipping.
  float clip;
  // AdamW's weight decay.
  float weight_decay;
  // Seeds the dropout masks.
  uint64_t seed;
  // Not 0: each layer's activations are computed again in the backward pass, which saves memory and costs time.
  int32_t checkpoint_activations;
} hydra_train_options;

// An adapter in training, with its optimiser. 0 is no trainer.
typedef uint64_t hydra_trainer;

// One example.
typedef struct hydra_sequence {
  // `len` token ids.
  const uint32_t *tokens;
  // What is to be predicted after each of them, or HYDRA_NO_TARGET: `len` ids. If it is null, the tokens after the first
  // `prompt_len` are to be predicted, each from those before it.
  const uint32_t *targets;
  // Number of tokens.
  size_t len;
  // Tokens that need not be predicted; not read if there are targets.
  size_t prompt_len;
  // For the label gate, the head of this example's label, or HYDRA_NO_LORA_HEAD.
  uint32_t lora_head;
} hydra_sequence;

// What one training step did.
typedef struct hydra_step_report {
  // Mean negative log-likelihood of the targets, before the update.
  double loss;
  // Norm of the gradient before clipping.
  double grad_norm;
  // Tokens that went through the model.
  size_t tokens;
  // Targets among them.
  size_t targets;
} hydra_step_report;

// A sequence's loss.
typedef struct hydra_loss {
  // Negative log-likelihood, summed over the targets, in nats.
  double nll;
  // Number of targets.
  size_t targets;
} hydra_loss;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// HydraLoRA as published: rank 4, four heads, a router, on the feed-forward's three layers. Any thread may call it.
struct hydra_adapter_options hydra_adapter_options_default(void);

// Makes a new adapter for the model, which changes nothing yet: A is random by `seed`, B is zero. `options` may be null,
// for the defaults. Any thread may call it. The caller owns `adapter` and frees it with `hydra_adapter_free`.
hydra_status hydra_adapter_init(hydra_model model,
                                const struct hydra_adapter_options *options,
                                uint64_t seed,
                                hydra_adapter *adapter);

// Reads an adapter's folder, of this library, of the published implementation or of HF PEFT, for the model. Any thread may
// call it. The caller owns `adapter` and frees it with `hydra_adapter_free`.
hydra_status hydra_adapter_load(hydra_model model,
                                const char *folder,
                                hydra_adapter *adapter);

// Attaches an adapter to another model of the same sizes; the new handle is as one that was loaded for it. Any thread may
// call it. The caller owns `attached` and frees it with `hydra_adapter_free`.
hydra_status hydra_adapter_attach(hydra_adapter adapter,
                                  hydra_model model,
                                  hydra_adapter *attached);

// Copies one head with its A and B as a LoRA, without the gate, for the same model. Of an adapter with the label gate, it
// generates as trained for that head's label. Any thread may call it. The caller owns `alone` and frees it with
// `hydra_adapter_free`.
hydra_status hydra_adapter_head(hydra_adapter adapter,
                                uint32_t head,
                                hydra_adapter *alone);

// Writes the adapter's two files into a folder, which is made if need be. Any thread may call it, but not two for one
// folder at the same time.
hydra_status hydra_adapter_save(hydra_adapter adapter,
                                const char *folder);

// Writes the number of the adapter's parameters to `count`. Any thread may call it.
hydra_status hydra_adapter_parameters(hydra_adapter adapter, uint64_t *count);

// Frees an adapter. Generators and trainers that were made with it stay usable. 0 is allowed. Any thread may call it, even
// while others use the adapter.
hydra_status hydra_adapter_free(hydra_adapter adapter);

// The text of this thread's latest error, in UTF-8 and on one line; empty if there was none. It stays valid until the
// thread's next error, and is not to be freed. Any thread may call it.
const char *hydra_last_error(void);

// Makes an empty sequence with room for `max_tokens` tokens. `adapter` may be 0, for none. Any thread may call it. The
// caller owns `generator` and frees it with `hydra_generator_free`.
hydra_status hydra_generator_new(hydra_model model,
                                 hydra_adapter adapter,
                                 size_t max_tokens,
                                 hydra_generator *generator);

// Appends `count` tokens to the sequence, at least one, and writes the logits of what may follow to `logits`.
//
// `logits_len` is the vocabulary's size, or 0 if the logits aren't needed. After an error nothing has been appended. Use a
// generator from one thread at a time; a second call at the same time returns HYDRA_STATUS_BUSY.
hydra_status hydra_generator_feed(hydra_generator generator,
                                  const uint32_t *tokens,
                                  size_t count,
                                  float *logits,
                                  size_t logits_len);

// Writes the number of tokens that have been fed to `len`. Threads as `hydra_generator_feed`.
hydra_status hydra_generator_len(hydra_generator generator, size_t *len);

// Forgets all tokens from `len` on. Threads as `hydra_generator_feed`.
hydra_status hydra_generator_truncate(hydra_generator generator, size_t len);

// Frees a generator. 0 is allowed. Any thread may call it; memory in use by a call is given back when that call ends.
hydra_status hydra_generator_free(hydra_generator generator);

// Up to 256 tokens, each the likeliest, without adapter and stop texts. Any thread may call it.
struct hydra_generate_options hydra_generate_options_default(void);

// Continues a prompt of `prompt_len` bytes, UTF-8, and hands the text to `callback` as it is generated.
//
// `options` may be null, for the defaults, and so may `result`. After an error `callback` may have had some of the text.
// Any thread may call it, and several at the same time with one model and one adapter; `callback` is called from the same
// thread, and may call other functions of this library.
hydra_status hydra_generate(hydra_model model,
                            const char *prompt,
                            size_t prompt_len,
                            const struct hydra_generate_options *options,
                            hydra_text_callback callback,
                            void *user,
                            struct hydra_generation *result);

// Writes the assistant's turn after `count` messages, by the model's chat template. Otherwise as `hydra_generate`.
hydra_status hydra_chat(hydra_model model,
                        const struct hydra_message *messages,
                        size_t count,
                        const struct hydra_generate_options *options,
                        hydra_text_callback callback,
                        void *user,
                        struct hydra_generation *result);

// The CPU with all cores, in f32. Any thread may call it.
struct hydra_model_options hydra_model_options_default(void);

// Opens a Hugging Face folder or a GGUF file. `options` may be null, for the defaults. The files are mapped, and must not
// change while the model lives. Any thread may call it. The caller owns `model` and frees it with `hydra_model_free`.
hydra_status hydra_model_open(const char *path,
                              const struct hydra_model_options *options,
                              hydra_model *model);

// Opens a GGUF file that lies in memory; its bytes are copied. Otherwise as `hydra_model_open`.
hydra_status hydra_model_open_gguf(const uint8_t *bytes,
                                   size_t len,
                                   const struct hydra_model_options *options,
                                   hydra_model *model);

// Opens a Hugging Face folder whose files lie in memory: config.json, model.safetensors or its index and shards, and
// tokenizer.json with what belongs to it. Their bytes are copied. Otherwise as `hydra_model_open`.
hydra_status hydra_model_open_files(const struct hydra_file *files,
                                    size_t count,
                                    const struct hydra_model_options *options,
                                    hydra_model *model);

// Frees a model. Adapters, generators and trainers that were made of it stay usable; its memory is given back after the
// last of them. 0 is allowed. Any thread may call it, even while others use the model.
hydra_status hydra_model_free(hydra_model model);

// Writes the model's sizes to `info`. Any thread may call it.
hydra_status hydra_model_describe(hydra_model model, struct hydra_model_info *info);

// The token ids of a text of `len` bytes, UTF-8. With `begins` not 0 the text begins a sequence: the model's
// beginning-of-text token comes before it, if there is one.
//
// Writes up to `capacity` ids to `tokens` and their number to `count`. If there are more, it writes only the number and
// returns HYDRA_STATUS_BUFFER_TOO_SMALL: call it with capacity 0 to learn the number. Any thread may call it.
hydra_status hydra_tokenize(hydra_model model,
                            const char *text,
                            size_t len,
                            int32_t begins,
                            uint32_t *tokens,
                            size_t capacity,
                            size_t *count);

// The text of `count` token ids, UTF-8, without special tokens and ids that the tokenizer doesn't have.
//
// Writes up to `capacity` bytes to `text`, a zero byte at their end among them, and the number of bytes with the zero byte
// to `len`. If there are more, it writes only the number and returns HYDRA_STATUS_BUFFER_TOO_SMALL. Any thread may call it.
hydra_status hydra_detokenize(hydra_model model,
                              const uint32_t *tokens,
                              size_t count,
                              char *text,
                              size_t capacity,
                              size_t *len);

// All tokens that end a text, ascending, for loops over a generator: a chat model may have several.
//
// Writes up to `capacity` ids to `tokens` and their number to `count`. If there are more, it writes only the number and
// returns HYDRA_STATUS_BUFFER_TOO_SMALL. Any thread may call it.
hydra_status hydra_model_end_tokens(hydra_model model,
                                    uint32_t *tokens,
                                    size_t capacity,
                                    size_t *count);

// Writes the token to end a text with, as one to train on, to `token`; HYDRA_STATUS_OTHER if the model has none. Any
// thread may call it.
hydra_status hydra_model_eos(hydra_model model,
                             uint32_t *token);

// Writes the floats of scratch that each of `nth` threads needs for a backward pass to `floats`. Of `args`, only tokens,
// element and dropout are read. Any thread may call it.
hydra_status hydra_backward_scratch(const struct hydra_layer *layer,
                                    const struct hydra_backward_args *args,
                                    size_t nth,
                                    size_t *floats);

// What thread `ith` of `nth` does of a backward pass. After all of them have returned, dx, da and db are complete.
//
// Otherwise as hydra_forward.
hydra_status hydra_backward(const struct hydra_layer *layer,
                            const struct hydra_backward_args *args,
                            const struct hydra_thread *thread);

// Writes the floats of scratch that each of `nth` threads needs for a forward pass to `floats`. Of `args`, only tokens,
// element and dropout are read. Any thread may call it.
hydra_status hydra_forward_scratch(const struct hydra_layer *layer,
                                   const struct hydra_forward_args *args,
                                   size_t nth,
                                   size_t *floats);

// What thread `ith` of `nth` does of a forward pass. After all of them have returned, y and adapter_state are complete.
//
// Each of the threads calls it once, with the same layer and args, at the same time or one after the other. Results have
// the same bits for any number of threads. It allocates nothing, unless for an error's text, and starts no threads. All
// memory is the caller's; what is written must not overlap with anything else.
hydra_status hydra_forward(const struct hydra_layer *layer,
                           const struct hydra_forward_args *args,
                           const struct hydra_thread *thread);

// Passes of 2,048 tokens, gradients clipped to norm 1, no decay, seed 0, activations kept. Any thread may call it.
struct hydra_train_options hydra_train_options_default(void);

// Makes a trainer that starts from the adapter, which itself stays as it is. `options` may be null, for the defaults. Any
// thread may call it. The caller owns `trainer` and frees it with `hydra_trainer_free`.
hydra_status hydra_trainer_new(hydra_model model,
                               hydra_adapter adapter,
                               const struct hydra_train_options *options,
                               hydra_trainer *trainer);

// One step of AdamW on the mean loss of `count` sequences, with learning rate `lr`. `report` may be null.
//
// After an error the adapter is as it was before the step. If the loss isn't finite (HYDRA_STATUS_NOT_FINITE), the trainer's
// last step, which has led there, is taken back too.
//
// Use a trainer from one thread at a time; a second call at the same time returns HYDRA_STATUS_BUSY.
hydra_status hydra_trainer_step(hydra_trainer trainer,
                                const struct hydra_sequence *sequences,
                                size_t count,
                                float lr,
                                struct hydra_step_report *report);

// Ends the step that is under way in another thread, or else the next one, with HYDRA_STATUS_CANCELLED. Any thread may
// call it.
hydra_status hydra_trainer_cancel(hydra_trainer trainer);

// Copies the adapter as it is now, attached to the trainer's model. Threads as `hydra_trainer_step`. The caller owns
// `adapter` and frees it with `hydra_adapter_free`.
hydra_status hydra_trainer_adapter(hydra_trainer trainer,
                                   hydra_adapter *adapter);

// Frees a trainer. 0 is allowed. Any thread may call it; memory in use by a call is given back when that call ends.
hydra_status hydra_trainer_free(hydra_trainer trainer);

// Writes the losses of `count` sequences to `losses`. `adapter` may be 0, for none; `max_tokens` is the most tokens in one
// pass, and no sequence may be longer. Any thread may call it.
hydra_status hydra_evaluate(hydra_model model,
                            hydra_adapter adapter,
                            const struct hydra_sequence *sequences,
                            size_t count,
                            size_t max_tokens,
                            struct hydra_loss *losses);

// The library's HYDRA_ABI_VERSION. Any thread may call it.
uint32_t hydra_abi_version(void);

// The library's version, "0.1.0" say. The text is static. Any thread may call it.
const char *hydra_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* HYDRA_H */
