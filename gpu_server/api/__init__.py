"""The HTTP edge: one module a resource. pydantic lives here; decisions do not."""
