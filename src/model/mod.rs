//! The policy model and what surrounds it: loading, tokenizer, chat template.

pub mod chat_template;
mod chat_template_env;
mod chat_template_json;
mod chat_template_spans;
pub mod tokenizer;
mod tokenizer_bpe;
mod tokenizer_folder;
mod tokenizer_gguf;
mod tokenizer_spm;
mod tokenizer_stream;
