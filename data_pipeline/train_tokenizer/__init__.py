"""Stage ``train_tokenizer``: a byte-level BPE vocabulary, learnt from the documents."""
