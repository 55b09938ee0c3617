"""Bridges to public evaluation kits: SPAR as a model of lmms-eval, VLMEvalKit and GenEditEvalKit.

Each is written against its kit's source, whose version its docstring names. No kit is a dependency: without it a bridge
can still be imported. Data, judges and scores are the kits' own. Commands: docs/bridges.md.
"""
