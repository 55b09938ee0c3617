"""The network of SPAR: encoder, unified tokenizer, language model, router, connector, denoiser, and the whole model."""
