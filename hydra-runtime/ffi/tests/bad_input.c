// Wrong arguments: each is an error with a text, and none a crash. bad_input MODEL ADAPTER TEMPORARY_FOLDER
#include "hydra.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0, checks = 0;

static const char *text(void) { return hydra_last_error(); }

// The call has to return `want`, and an error to leave a text with `part` in it.
static void expect(int line, const char *call, hydra_status got, hydra_status want, const char *part) {
    checks++;
    int right = got == want && (want == HYDRA_STATUS_OK || (strlen(text()) > 0 && strstr(text(), part) != NULL));
    if (!right) {
        failures++;
        fprintf(stderr, "line %d: %s: expected %d with \"%s\", found %d: %s\n", line, call, want, part, got, text());
    }
}
#define REFUSED(call, code, part) expect(__LINE__, #call, call, HYDRA_STATUS_##code, part)
#define DONE(call) expect(__LINE__, #call, call, HYDRA_STATUS_OK, "")

static int32_t ignore(const char *piece, size_t len, void *user) {
    (void)piece, (void)len;
    ++*(int *)user;
    return 0;
}

static int32_t stop_at_once(const char *piece, size_t len, void *user) { return ignore(piece, len, user) + 1; }

// Calls the library from inside a call.
static int32_t reenter(const char *piece, size_t len, void *user) {
    (void)piece, (void)len;
    hydra_model_info info;
    DONE(hydra_model_describe(*(hydra_model *)user, &info));
    return 1;
}

static void models(const char *path, const char *folder) {
    hydra_model model = 0;
    hydra_model_options options = hydra_model_options_default();
    REFUSED(hydra_model_open(NULL, NULL, &model), INVALID_ARGUMENT, "path is null");
    REFUSED(hydra_model_open(path, NULL, NULL), INVALID_ARGUMENT, "model is null");
    REFUSED(hydra_model_open("no/such/model", NULL, &model), IO, "no/such/model");
    REFUSED(hydra_model_open("caf\xe9", NULL, &model), INVALID_ARGUMENT, "not UTF-8: see byte 3");
    REFUSED(hydra_model_open(folder, NULL, &model), FORMAT, "no config.json");
    options.precision = 7;
    REFUSED(hydra_model_open(path, &options, &model), INVALID_ARGUMENT, "hydra_precision, found 7");
    options = hydra_model_options_default();
    options.device = -2;
    REFUSED(hydra_model_open(path, &options, &model), INVALID_ARGUMENT, "found -2");
    options.device = 99;
    REFUSED(hydra_model_open(path, &options, &model), DEVICE, "99");
    REFUSED(hydra_model_open_gguf(NULL, 10, NULL, &model), INVALID_ARGUMENT, "bytes is null");
    REFUSED(hydra_model_open_gguf(NULL, 0, NULL, &model), FORMAT, "<memory>");
    REFUSED(hydra_model_open_gguf((const uint8_t *)"GGUF", 4, NULL, &model), FORMAT, "<memory>");
    REFUSED(hydra_model_open_gguf((const uint8_t *)path, SIZE_MAX, NULL, &model), INVALID_ARGUMENT, "don't fit");
    hydra_file file = {.name = "config.json", .bytes = (const uint8_t *)"{}", .len = 2};
    REFUSED(hydra_model_open_files(&file, 1, NULL, &model), FORMAT, "config.json");
    file.name = NULL;
    REFUSED(hydra_model_open_files(&file, 1, NULL, &model), INVALID_ARGUMENT, "name is null");
    REFUSED(hydra_model_open_files(NULL, 1, NULL, &model), INVALID_ARGUMENT, "files is null");
    if (model != 0) {
        fprintf(stderr, "an error wrote a handle\n");
        failures++;
    }
}

static void handles(hydra_model model, hydra_adapter adapter) {
    hydra_model_info info;
    hydra_generator generator;
    hydra_trainer trainer;
    uint64_t parameters;
    uint64_t bad[] = {0, 1, 0xdeadbeef, UINT64_MAX, model + 1, model + ((uint64_t)1 << 32), adapter};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        REFUSED(hydra_model_describe(bad[i], &info), INVALID_HANDLE, "model");
        REFUSED(hydra_generator_len(bad[i], &(size_t){0}), INVALID_HANDLE, "generator");
        REFUSED(hydra_generator_truncate(bad[i], 0), INVALID_HANDLE, "generator");
        REFUSED(hydra_trainer_cancel(bad[i]), INVALID_HANDLE, "trainer");
    }
    REFUSED(hydra_model_describe(adapter, &info), INVALID_HANDLE, "expected model, found adapter");
    REFUSED(hydra_model_describe(model, NULL), INVALID_ARGUMENT, "info is null");
    // Freed: by its id alone, and not what has taken its place.
    hydra_adapter freed, next;
    DONE(hydra_adapter_attach(adapter, model, &freed));
    DONE(hydra_adapter_free(freed));
    DONE(hydra_adapter_attach(adapter, model, &next));
    REFUSED(hydra_adapter_free(freed), INVALID_HANDLE, "no such adapter: it has been freed");
    REFUSED(hydra_adapter_parameters(freed, &parameters), INVALID_HANDLE, "freed");
    REFUSED(hydra_adapter_save(freed, "nowhere"), INVALID_HANDLE, "freed");
    REFUSED(hydra_generator_new(model, freed, 8, &generator), INVALID_HANDLE, "freed");
    REFUSED(hydra_trainer_new(model, freed, NULL, &trainer), INVALID_HANDLE, "freed");
    REFUSED(hydra_adapter_attach(freed, model, &next), INVALID_HANDLE, "freed");
    int pieces = 0;
    hydra_generate_options options = hydra_generate_options_default();
    options.adapter = freed;
    const hydra_message message = {.role = "user", .content = "one"};
    REFUSED(hydra_generate(model, "one", 3, &options, ignore, &pieces, NULL), INVALID_HANDLE, "freed");
    REFUSED(hydra_chat(model, &message, 1, &options, ignore, &pieces, NULL), INVALID_HANDLE, "freed");
    hydra_loss loss;
    const hydra_sequence sequence = {
        .tokens = (const uint32_t[]){1, 2}, .len = 2, .prompt_len = 1, .lora_head = HYDRA_NO_LORA_HEAD,
    };
    REFUSED(hydra_evaluate(model, freed, &sequence, 1, 8, &loss), INVALID_HANDLE, "freed");
    REFUSED(hydra_trainer_new(model, 0, NULL, &trainer), INVALID_HANDLE, "the handle is 0");
    DONE(hydra_adapter_parameters(next, &parameters));
    DONE(hydra_adapter_free(next));
    DONE(hydra_adapter_free(0));
    DONE(hydra_model_free(0));
}

static void adapters(hydra_model model, const char *folder) {
    hydra_adapter adapter;
    REFUSED(hydra_adapter_load(model, NULL, &adapter), INVALID_ARGUMENT, "folder is null");
    REFUSED(hydra_adapter_load(model, folder, &adapter), FORMAT, "not an adapter folder");
    REFUSED(hydra_adapter_load(model, "\xff", &adapter), INVALID_ARGUMENT, "UTF-8");
    hydra_adapter_options options = hydra_adapter_options_default();
    options.method = 3;
    REFUSED(hydra_adapter_init(model, &options, 0, &adapter), INVALID_ARGUMENT, "hydra_method");
    options = hydra_adapter_options_default();
    options.gate = -1;
    REFUSED(hydra_adapter_init(model, &options, 0, &adapter), INVALID_ARGUMENT, "hydra_gate");
    options = hydra_adapter_options_default();
    options.targets = 1u << 7;
    REFUSED(hydra_adapter_init(model, &options, 0, &adapter), INVALID_ARGUMENT, "hydra_projection");
    options = hydra_adapter_options_default();
    options.alpha = NAN;
    REFUSED(hydra_adapter_init(model, &options, 0, &adapter), INVALID_ARGUMENT, "alpha");
    options = hydra_adapter_options_default();
    options.top_k = options.lora_heads + 1;
    REFUSED(hydra_adapter_init(model, &options, 0, &adapter), INVALID_ARGUMENT, "top-k 5");
    options = hydra_adapter_options_default();
    options.rank = SIZE_MAX;
    REFUSED(hydra_adapter_init(model, &options, 0, &adapter), INVALID_ARGUMENT, "rank");
    REFUSED(hydra_adapter_init(model, NULL, 0, NULL), INVALID_ARGUMENT, "adapter is null");
}

// An adapter that is attached to another model, though to one of the same sizes.
static void others(const char *path, hydra_model model, hydra_adapter adapter) {
    hydra_model other;
    hydra_generator generator;
    hydra_loss loss;
    int pieces = 0;
    DONE(hydra_model_open(path, NULL, &other));
    REFUSED(hydra_generator_new(other, adapter, 8, &generator), WRONG_ADAPTER, "another model");
    hydra_generate_options options = hydra_generate_options_default();
    options.adapter = adapter;
    REFUSED(hydra_generate(other, "one", 3, &options, ignore, &pieces, NULL), WRONG_ADAPTER, "another model");
    hydra_sequence sequence = {
        .tokens = (const uint32_t[]){1, 2}, .len = 2, .prompt_len = 1, .lora_head = HYDRA_NO_LORA_HEAD,
    };
    REFUSED(hydra_evaluate(other, adapter, &sequence, 1, 8, &loss), WRONG_ADAPTER, "another model");
    DONE(hydra_model_free(other));
    // A head that an adapter with the label gate doesn't have.
    hydra_adapter_options kind = hydra_adapter_options_default();
    hydra_adapter labelled;
    kind.gate = HYDRA_GATE_LABEL;
    DONE(hydra_adapter_init(model, &kind, 0, &labelled));
    DONE(hydra_evaluate(model, labelled, &sequence, 1, 8, &loss));
    sequence.lora_head = (uint32_t)kind.lora_heads;
    REFUSED(hydra_evaluate(model, labelled, &sequence, 1, 8, &loss), WRONG_ADAPTER, "head 4");
    hydra_adapter alone;
    REFUSED(hydra_adapter_head(labelled, 4, &alone), WRONG_ADAPTER, "head 4 of an adapter of 4 heads");
    REFUSED(hydra_adapter_head(labelled, HYDRA_NO_LORA_HEAD, &alone), WRONG_ADAPTER, "head 4294967295");
    REFUSED(hydra_adapter_head(labelled, 0, NULL), INVALID_ARGUMENT, "alone is null");
    DONE(hydra_adapter_head(labelled, 3, &alone));
    DONE(hydra_adapter_free(labelled));
    REFUSED(hydra_adapter_head(labelled, 0, &alone), INVALID_HANDLE, "freed");
    sequence.lora_head = HYDRA_NO_LORA_HEAD;
    DONE(hydra_evaluate(model, alone, &sequence, 1, 8, &loss));
    DONE(hydra_adapter_free(alone));
    if (pieces != 0) {
        fprintf(stderr, "an error gave text\n");
        failures++;
    }
}

// A model whose weights are not numbers.
static void not_numbers(const char *path) {
    static const char *const names[] = {"config.json", "tokenizer.json", "model.safetensors"};
    enum { COUNT = sizeof names / sizeof *names };
    hydra_file files[COUNT];
    uint8_t *bytes[COUNT];
    for (int i = 0; i < COUNT; i++) {
        char name[4096];
        snprintf(name, sizeof name, "%s/%s", path, names[i]);
        FILE *file = fopen(name, "rb");
        if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
            perror(name);
            exit(2);
        }
        size_t len = (size_t)ftell(file);
        rewind(file);
        bytes[i] = malloc(len);
        if (fread(bytes[i], 1, len, file) != len) {
            perror(name);
            exit(2);
        }
        fclose(file);
        files[i] = (hydra_file){.name = names[i], .bytes = bytes[i], .len = len};
    }
    // The tensors come after a header, whose length is in the first eight bytes.
    uint64_t header;
    memcpy(&header, bytes[COUNT - 1], 8);
    memset(bytes[COUNT - 1] + 8 + header, 0xff, files[COUNT - 1].len - 8 - header);
    hydra_model model;
    DONE(hydra_model_open_files(files, COUNT, NULL, &model));
    for (int i = 0; i < COUNT; i++) {
        free(bytes[i]);
    }
    int pieces = 0;
    REFUSED(hydra_generate(model, "one", 3, NULL, ignore, &pieces, NULL), NOT_FINITE, "NaN");
    hydra_adapter adapter;
    hydra_trainer trainer;
    DONE(hydra_adapter_init(model, NULL, 0, &adapter));
    DONE(hydra_trainer_new(model, adapter, NULL, &trainer));
    const hydra_sequence sequence = {
        .tokens = (const uint32_t[]){1, 2}, .len = 2, .prompt_len = 1, .lora_head = HYDRA_NO_LORA_HEAD,
    };
    REFUSED(hydra_trainer_step(trainer, &sequence, 1, 1e-3f, NULL), NOT_FINITE, "loss");
    DONE(hydra_trainer_free(trainer));
    DONE(hydra_adapter_free(adapter));
    DONE(hydra_model_free(model));
    if (pieces != 0) {
        fprintf(stderr, "an error gave text\n");
        failures++;
    }
}

static void texts(hydra_model model, hydra_adapter adapter) {
    size_t count = 77;
    uint32_t tokens[64];
    char back[64];
    REFUSED(hydra_tokenize(model, "caf\xe9!", 5, 0, tokens, 64, &count), INVALID_ARGUMENT, "not UTF-8: see byte 3");
    REFUSED(hydra_tokenize(model, NULL, 3, 0, tokens, 64, &count), INVALID_ARGUMENT, "text is null");
    REFUSED(hydra_tokenize(model, "one", 3, 0, tokens, 64, NULL), INVALID_ARGUMENT, "count is null");
    REFUSED(hydra_tokenize(model, "one", 3, 0, NULL, 64, &count), INVALID_ARGUMENT, "tokens is null");
    REFUSED(hydra_tokenize(model, "one two three", 13, 0, tokens, 1, &count), BUFFER_TOO_SMALL, "room for 1");
    size_t needed = count;
    DONE(hydra_tokenize(model, "one two three", 13, 0, tokens, needed, &count));
    REFUSED(hydra_detokenize(model, tokens, count, back, 3, &needed), BUFFER_TOO_SMALL, "room for 3");
    DONE(hydra_detokenize(model, tokens, count, back, sizeof back, &needed));
    DONE(hydra_tokenize(model, NULL, 0, 0, NULL, 0, &count));
    REFUSED(hydra_detokenize(model, tokens, 1, back, sizeof back, NULL), INVALID_ARGUMENT, "len is null");
    REFUSED(hydra_detokenize(model, NULL, 1, back, sizeof back, &needed), INVALID_ARGUMENT, "tokens is null");
    // An id that is no token's has no text.
    DONE(hydra_detokenize(model, (const uint32_t[]){99999, UINT32_MAX}, 2, back, sizeof back, &needed));
    if (needed != 1 || back[0] != 0) {
        fprintf(stderr, "ids outside of the vocabulary have a text: %s\n", back);
        failures++;
    }
    REFUSED(hydra_model_eos(model, NULL), INVALID_ARGUMENT, "token is null");
    REFUSED(hydra_model_eos(0, tokens), INVALID_HANDLE, "the handle is 0");
    REFUSED(hydra_model_end_tokens(model, tokens, 0, &count), BUFFER_TOO_SMALL, "room for 0");
    REFUSED(hydra_model_end_tokens(model, tokens, 8, NULL), INVALID_ARGUMENT, "count is null");

    int pieces = 0;
    hydra_generation result;
    hydra_generate_options options = hydra_generate_options_default();
    options.adapter = adapter;
    options.max_tokens = 4;
    REFUSED(hydra_generate(model, "\xff", 1, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "UTF-8");
    REFUSED(hydra_generate(model, "one", 3, &options, NULL, &pieces, NULL), INVALID_ARGUMENT, "callback is null");
    options.temperature = NAN;
    REFUSED(hydra_generate(model, "one", 3, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "temperature NaN");
    options.temperature = 1.0f;
    options.top_p = 0.0f;
    REFUSED(hydra_generate(model, "one", 3, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "top-p 0");
    options.top_p = 1.0f;
    options.min_p = 1.5f;
    REFUSED(hydra_generate(model, "one", 3, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "min-p 1.5");
    options.min_p = 0.0f;
    options.repetition_penalty = 0.0f;
    REFUSED(hydra_generate(model, "one", 3, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "repetition penalty 0");
    options.repetition_penalty = 1.0f;
    options.stop_count = 1;
    REFUSED(hydra_generate(model, "one", 3, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "stop is null");
    options.stop = (const char *const[]){"\xc3"};
    REFUSED(hydra_generate(model, "one", 3, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "UTF-8");
    options.stop = (const char *const[]){""};
    REFUSED(hydra_generate(model, "one", 3, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "empty stop");
    options.stop_count = 0;
    char *prompt = malloc(4000);
    memset(prompt, 'z', 4000);
    REFUSED(hydra_generate(model, prompt, 4000, &options, ignore, &pieces, NULL), TOO_LONG, "tokens");
    free(prompt);
    hydra_message message = {.role = "user", .content = NULL};
    REFUSED(hydra_chat(model, &message, 1, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "message is null");
    message.content = "caf\xe9";
    REFUSED(hydra_chat(model, &message, 1, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "not UTF-8: see byte 3");
    message = (hydra_message){.role = NULL, .content = "one"};
    REFUSED(hydra_chat(model, &message, 1, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "role is null");
    message.role = "us\xff";
    REFUSED(hydra_chat(model, &message, 1, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "not UTF-8: see byte 2");
    REFUSED(hydra_chat(model, NULL, 1, &options, ignore, &pieces, NULL), INVALID_ARGUMENT, "messages is null");
    message.role = "user";
    REFUSED(hydra_chat(model, &message, 1, &options, ignore, &pieces, NULL), OTHER, "chat template");
    if (pieces != 0) {
        fprintf(stderr, "an error gave text\n");
        failures++;
    }
    DONE(hydra_generate(model, "one", 3, &options, stop_at_once, &pieces, &result));
    if (pieces != 1 || result.finish != HYDRA_FINISH_CALLBACK) {
        fprintf(stderr, "the callback didn't end the text: %d pieces\n", pieces);
        failures++;
    }
    DONE(hydra_generate(model, "one", 3, &options, reenter, &model, &result));
}

static void generators(hydra_model model) {
    hydra_generator generator;
    REFUSED(hydra_generator_new(model, 0, 8, NULL), INVALID_ARGUMENT, "generator is null");
    REFUSED(hydra_generator_new(model, 0, SIZE_MAX, &generator), TOO_LONG, "too long");
    DONE(hydra_generator_new(model, 0, 8, &generator));
    hydra_model_info info;
    DONE(hydra_model_describe(model, &info));
    float *logits = malloc(info.vocab * sizeof *logits);
    uint32_t tokens[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, outside = UINT32_MAX;
    size_t len = 0;
    REFUSED(hydra_generator_feed(generator, tokens, 0, logits, info.vocab), INVALID_ARGUMENT, "no tokens");
    REFUSED(hydra_generator_feed(generator, NULL, 2, logits, info.vocab), INVALID_ARGUMENT, "tokens is null");
    REFUSED(hydra_generator_feed(generator, tokens, 2, logits, info.vocab - 1), INVALID_ARGUMENT, "logits: expected");
    REFUSED(hydra_generator_feed(generator, tokens, 2, NULL, info.vocab), INVALID_ARGUMENT, "logits is null");
    REFUSED(hydra_generator_feed(generator, (void *)((char *)tokens + 1), 2, NULL, 0), INVALID_ARGUMENT, "multiple of 4");
    REFUSED(hydra_generator_feed(generator, &outside, 1, logits, info.vocab), INVALID_ARGUMENT, "4294967295");
    REFUSED(hydra_generator_feed(generator, tokens, 9, logits, info.vocab), TOO_LONG, "8");
    DONE(hydra_generator_len(generator, &len));
    DONE(hydra_generator_feed(generator, tokens, 8, logits, info.vocab));
    REFUSED(hydra_generator_feed(generator, tokens, 1, NULL, 0), TOO_LONG, "8");
    DONE(hydra_generator_truncate(generator, 7));
    DONE(hydra_generator_feed(generator, tokens + 7, 1, NULL, 0));
    DONE(hydra_generator_free(generator));
    REFUSED(hydra_generator_feed(generator, tokens, 1, NULL, 0), INVALID_HANDLE, "no such generator");
    REFUSED(hydra_generator_free(generator), INVALID_HANDLE, "no such generator");
    free(logits);
    if (len != 0) {
        fprintf(stderr, "an error left %zu tokens\n", len);
        failures++;
    }
}

static void trainers(hydra_model model, hydra_adapter adapter) {
    hydra_trainer trainer;
    hydra_train_options options = hydra_train_options_default();
    options.max_tokens = 0;
    REFUSED(hydra_trainer_new(model, adapter, &options, &trainer), INVALID_ARGUMENT, "max_tokens 0");
    options.max_tokens = 16;
    options.clip = NAN;
    REFUSED(hydra_trainer_new(model, adapter, &options, &trainer), INVALID_ARGUMENT, "norm NaN");
    options.clip = 1.0f;
    options.weight_decay = -1.0f;
    REFUSED(hydra_trainer_new(model, adapter, &options, &trainer), INVALID_ARGUMENT, "weight_decay");
    options.weight_decay = 0.0f;
    DONE(hydra_trainer_new(model, adapter, &options, &trainer));
    uint32_t tokens[17] = {1, 2, 3, 4};
    hydra_sequence good = {.tokens = tokens, .len = 4, .prompt_len = 2, .lora_head = HYDRA_NO_LORA_HEAD};
    hydra_sequence bad = good;
    hydra_step_report report;
    REFUSED(hydra_trainer_step(trainer, NULL, 1, 1e-3f, &report), INVALID_ARGUMENT, "sequences is null");
    REFUSED(hydra_trainer_step(trainer, &good, 0, 1e-3f, &report), INVALID_ARGUMENT, "");
    REFUSED(hydra_trainer_step(trainer, &good, 1, NAN, &report), INVALID_ARGUMENT, "NaN");
    bad.tokens = NULL;
    REFUSED(hydra_trainer_step(trainer, &bad, 1, 1e-3f, &report), INVALID_ARGUMENT, "tokens is null");
    bad = good;
    bad.prompt_len = 5;
    REFUSED(hydra_trainer_step(trainer, &bad, 1, 1e-3f, &report), INVALID_ARGUMENT, "prompt_len");
    bad.prompt_len = 4;
    REFUSED(hydra_trainer_step(trainer, &bad, 1, 1e-3f, &report), INVALID_ARGUMENT, "target");
    bad = good;
    bad.len = 17;
    REFUSED(hydra_trainer_step(trainer, &bad, 1, 1e-3f, &report), TOO_LONG, "17");
    bad = good;
    bad.targets = (const uint32_t[]){HYDRA_NO_TARGET, 99999, HYDRA_NO_TARGET, HYDRA_NO_TARGET};
    REFUSED(hydra_trainer_step(trainer, &bad, 1, 1e-3f, &report), INVALID_ARGUMENT, "99999");
    DONE(hydra_trainer_cancel(trainer));
    REFUSED(hydra_trainer_step(trainer, &good, 1, 1e-3f, &report), CANCELLED, "");
    // The step that made the loss infinite is undone.
    DONE(hydra_trainer_step(trainer, &good, 1, 1e30f, &report));
    REFUSED(hydra_trainer_step(trainer, &good, 1, 1e-3f, &report), NOT_FINITE, "loss");
    DONE(hydra_trainer_step(trainer, &good, 1, 1e-3f, NULL));
    hydra_loss loss;
    REFUSED(hydra_evaluate(model, adapter, &good, 1, 0, &loss), INVALID_ARGUMENT, "max_tokens 0");
    REFUSED(hydra_evaluate(model, adapter, &good, 1, 16, NULL), INVALID_ARGUMENT, "losses is null");
    DONE(hydra_evaluate(model, adapter, &good, 1, 16, &loss));
    REFUSED(hydra_trainer_adapter(trainer, NULL), INVALID_ARGUMENT, "adapter is null");
    DONE(hydra_trainer_free(trainer));
    REFUSED(hydra_trainer_step(trainer, &good, 1, 1e-3f, NULL), INVALID_HANDLE, "no such trainer");
}

static void operators(void) {
    enum { T = 5, IN = 40, OUT = 33, R = 2, N = 2 };
    static float w[OUT * IN], a[(R + N) * IN], b[OUT * R * N], x[T * IN], y[T * OUT], state[T * (R + N)];
    static float dx[T * IN], da[(R + N) * IN], db[OUT * R * N];
    hydra_layer layer = {
        .d_in = IN, .d_out = OUT, .weight = w, .weight_bytes = sizeof w, .weight_type = HYDRA_TYPE_F32,
        .product_type = HYDRA_TYPE_F32, .rank = R, .lora_heads = N, .gate = HYDRA_GATE_ROUTER, .temperature = 1.0f,
        .scale = 1.0f, .a = a, .a_len = (R + N) * IN, .b = b, .b_len = OUT * R * N,
    }, bad;
    hydra_forward_args args = {.tokens = T, .element = HYDRA_TYPE_F32, .x = x, .y = y, .adapter_state = state}, wrong;
    size_t floats;
    DONE(hydra_forward_scratch(&layer, &args, 1, &floats));
    float *scratch = malloc(floats * sizeof *scratch);
    hydra_thread thread = {.ith = 0, .nth = 1, .scratch = scratch, .scratch_len = floats}, other = thread;
    REFUSED(hydra_forward(NULL, &args, &thread), INVALID_ARGUMENT, "layer is null");
    REFUSED(hydra_forward(&layer, NULL, &thread), INVALID_ARGUMENT, "args is null");
    REFUSED(hydra_forward(&layer, &args, NULL), INVALID_ARGUMENT, "thread is null");
    REFUSED(hydra_forward_scratch(&layer, &args, 1, NULL), INVALID_ARGUMENT, "floats is null");
    other.scratch_len = floats - 1;
    REFUSED(hydra_forward(&layer, &args, &other), INVALID_ARGUMENT, "workspace is too small");
    other = (hydra_thread){.ith = 1, .nth = 1, .scratch = scratch, .scratch_len = floats};
    REFUSED(hydra_forward(&layer, &args, &other), INVALID_ARGUMENT, "ith below nth");
    other = (hydra_thread){.ith = 0, .nth = 1, .scratch = NULL, .scratch_len = floats};
    REFUSED(hydra_forward(&layer, &args, &other), INVALID_ARGUMENT, "scratch is null");
#define LAYER(field, value, part) \
    (bad = layer, bad.field = value, REFUSED(hydra_forward(&bad, &args, &thread), INVALID_ARGUMENT, part))
    LAYER(weight, NULL, "weight is null");
    LAYER(weight_bytes, sizeof w - 1, "weight bytes");
    LAYER(weight_type, 4, "4 is no hydra_type");
    LAYER(product_type, HYDRA_TYPE_F16, "product_type");
    LAYER(weight_type, HYDRA_TYPE_Q4_0, "multiple of 32");
    LAYER(a_len, 3, "a: wrong number");
    LAYER(b, NULL, "b is null");
    LAYER(gate, 9, "9 is no hydra_gate");
    LAYER(lora_heads, 0, "at least one head");
    LAYER(rank, SIZE_MAX / 2, "");
    LAYER(d_in, SIZE_MAX / 2, "don't fit into memory");
    LAYER(scale, NAN, "scale");
    LAYER(temperature, NAN, "temperature");
    LAYER(gate, HYDRA_GATE_LABEL, "");
#define ARGS(field, value, part) \
    (wrong = args, wrong.field = value, REFUSED(hydra_forward(&layer, &wrong, &thread), INVALID_ARGUMENT, part))
    ARGS(x, NULL, "x is null");
    ARGS(y, NULL, "y is null");
    ARGS(y, x, "y and x overlap");
    ARGS(y, scratch + floats - 1, "y and scratch overlap");
    ARGS(adapter_state, a, "adapter_state and a overlap");
    ARGS(element, HYDRA_TYPE_Q8_0, "element");
    ARGS(dropout, NAN, "dropout");
    ARGS(tokens, SIZE_MAX, "don't fit into memory");
    // A label is a head, or none. This gate has no router, so A has fewer rows.
    uint32_t heads[T] = {0, 1, HYDRA_NO_LORA_HEAD, 0, N};
    bad = layer, bad.gate = HYDRA_GATE_LABEL, bad.a_len = R * IN;
    wrong = args;
    REFUSED(hydra_forward(&bad, &wrong, &thread), INVALID_ARGUMENT, "labels is null");
    wrong.labels = heads;
    REFUSED(hydra_forward(&bad, &wrong, &thread), INVALID_ARGUMENT, "token 4 is for head 2 of 2");
    heads[4] = 1;
    DONE(hydra_forward(&bad, &wrong, &thread));
    DONE(hydra_forward(&layer, &args, &thread));
    free(scratch);

    hydra_backward_args back = {
        .tokens = T, .element = HYDRA_TYPE_F32, .dy = y, .x = x, .adapter_state = state, .dx = dx, .da = da, .db = db,
    }, not_back;
    DONE(hydra_backward_scratch(&layer, &back, 1, &floats));
    thread.scratch = scratch = malloc(floats * sizeof *scratch);
    thread.scratch_len = floats;
#define BACK(field, value, part)    \
    (not_back = back, not_back.field = value, \
     REFUSED(hydra_backward(&layer, &not_back, &thread), INVALID_ARGUMENT, part))
    BACK(dy, NULL, "dy is null");
    BACK(adapter_state, NULL, "adapter_state is null");
    BACK(da, NULL, "both or neither");
    BACK(dx, y, "dx and dy overlap");
    BACK(db, b, "db and b overlap");
    BACK(load_balance, INFINITY, "load_balance");
    BACK(dropout, 2.0f, "dropout");
    DONE(hydra_backward(&layer, &back, &thread));
    free(scratch);
    // A number that isn't finite is a value as any other.
    x[0] = NAN;
    DONE(hydra_forward_scratch(&layer, &args, 1, &floats));
    thread.scratch = scratch = malloc(floats * sizeof *scratch);
    thread.scratch_len = floats;
    DONE(hydra_forward(&layer, &args, &thread));
    free(scratch);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: bad_input MODEL ADAPTER FOLDER\n");
        return 2;
    }
    if (hydra_abi_version() != HYDRA_ABI_VERSION || strlen(hydra_version()) == 0 || strlen(text()) != 0) {
        fprintf(stderr, "wrong version, or an error before any call\n");
        return 1;
    }
    models(argv[1], argv[3]);
    operators();
    hydra_model model;
    hydra_adapter adapter;
    hydra_model_options options = hydra_model_options_default();
    options.threads = 2;
    DONE(hydra_model_open(argv[1], &options, &model));
    DONE(hydra_adapter_load(model, argv[2], &adapter));
    handles(model, adapter);
    adapters(model, argv[3]);
    others(argv[1], model, adapter);
    not_numbers(argv[1]);
    texts(model, adapter);
    generators(model);
    trainers(model, adapter);
    DONE(hydra_adapter_free(adapter));
    DONE(hydra_model_free(model));
    REFUSED(hydra_model_free(model), INVALID_HANDLE, "no such model: it has been freed");
    REFUSED(hydra_adapter_load(model, argv[2], &adapter), INVALID_HANDLE, "no such model");
    printf("%d passed, %d failed\n", checks - failures, failures);
    return failures == 0 ? 0 : 1;
}
