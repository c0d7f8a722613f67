"""A tokenizer is a function of the text that it is trained on."""

from tests.training.data.documents import make_documents
from training.data.tokenizer import special_ids, train_tokenizer


def test_tokenizer_is_a_function_of_the_text():
    documents = make_documents()
    trained = [train_tokenizer([documents[:20], documents[20:]], 320) for _ in range(3)]
    assert len({tokenizer.to_str() for tokenizer in trained}) == 1
    assert special_ids(trained[0]) == (0, 1)
    assert trained[0].get_vocab_size() == 320
