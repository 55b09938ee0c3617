"""The shapes world: scenes, their renders, their language, their judge and the training material made of them.

`scene` says what can be there, `render` draws it, `language` speaks about it (with `words`, `questions` and `edits`),
`judge` reads a picture back and `dataset` deals deterministic training material. Everything is a function of integer
seeds; nothing is downloaded.
"""
