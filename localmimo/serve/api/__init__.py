"""The dialects: each turns a body into a request and events into its own form."""
