"""DualToken (arXiv 2503.14324): one image encoder, two visual vocabularies, one autoregressive LLM over both.

Where the paper, its project page and the public tokenizer code differ, docs/dualtoken.md says what is followed.
"""
