"""OpenAI's API (platform.openai.com/docs/api-reference), as far as a Gemma-3 server has something to say."""
