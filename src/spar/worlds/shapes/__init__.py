"""The shapes world: scenes, renders, captions, a detector and training data.

`scene` defines the scenes, `render` renders them, `captions`, `questions`, `edits` and `tokenizer` are their language,
`detector` detects the objects of an image and `dataset` has deterministic training data. Everything is a function of
integer seeds; nothing is downloaded.
"""
