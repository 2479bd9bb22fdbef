def bloom_hf_config(c, sequence_length=None):
    import transformers
    return transformers.BloomConfig(vocab_size=c.vocab_size,hidden_size=c.hidden_size,n_layer=c.layers,n_head=c.heads,layer_norm_epsilon=c.layernorm_epsilon,hidden_dropout=c.dropout,attention_dropout=c.dropout)
