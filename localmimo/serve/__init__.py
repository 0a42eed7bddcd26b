"""HTTP over one engine: four dialects, one line of requests, one page. Extra: serve (starlette, uvicorn)."""
