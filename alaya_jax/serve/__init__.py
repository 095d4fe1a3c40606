"""An OpenAI-compatible HTTP server over `alaya_jax.engine`; see docs/server.md.

`protocol` understands requests and refuses what is not served, `answers` says results, `app` joins
both to the engine. Needs the extra "serve".
"""
