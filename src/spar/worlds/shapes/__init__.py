"""The shapes world: scenes, their renders, their language, their detector and the training data made of them.

`scene` says what can be there, `render` draws it, `language` speaks about it (with `words`, `questions` and `edits`),
`detect` reads an image back and `dataset` deals deterministic training data. Everything is a function of integer
seeds; nothing is downloaded.
"""
