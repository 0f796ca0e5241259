"""token_logprob"""
