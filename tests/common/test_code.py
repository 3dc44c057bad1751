"""A code of 75 bits proves each side to the other, and survives a person's typing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.code import ALPHABET, SYMBOLS, JoinAnswer, Secret, new_code, read_code
from common.errors import ConfigError

SEEN, OTHER = b"the server's certificate", b"that of somebody in between"
REQUEST = "a request"


@pytest.fixture(scope="module")
def code() -> str:
    return new_code()


@pytest.fixture(scope="module")
def secret(code: str) -> Secret:
    return Secret.of(code, "apple")


def test_codes_are_of_the_length_that_was_promised() -> None:
    codes = {new_code() for _ in range(500)}
    assert len(codes) == 500
    assert all(len(code) == 19 and code.count("-") == 3 for code in codes)
    bits = SYMBOLS * 5
    assert len(ALPHABET) == 32
    assert bits >= 75
    for place in range(SYMBOLS):  # every symbol is drawn
        assert len({read_code(code)[place] for code in codes}) > 25


@given(st.data())
def test_a_code_is_read_as_people_write_it(data: st.DataObject) -> None:
    code = new_code()
    plain = code.replace("-", "")
    typed = data.draw(st.sampled_from([code, code.lower(), plain, " ".join(plain), f" {code}\n"]))
    confused = typed.replace("0", data.draw(st.sampled_from("0Oo")))
    confused = confused.replace("1", data.draw(st.sampled_from("1IiLl")))
    assert read_code(confused) == plain


@given(st.integers(0, SYMBOLS), st.sampled_from(ALPHABET))
def test_one_wrong_symbol_is_noticed_where_it_is_typed(place: int, symbol: str) -> None:
    plain = read_code(new_code())
    if plain[place] != symbol:
        with pytest.raises(ConfigError, match="mistyped"):
            read_code(plain[:place] + symbol + plain[place + 1 :])


@pytest.mark.parametrize("text", ["", "ABCD", "U" * 16, "A" * 17, "é" * 16, "AAAA-AAAA-AAAA-AAA*"])
def test_what_is_no_code_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="16 letters"):
        read_code(text)


def test_both_sides_prove_that_they_know_the_code(secret: Secret) -> None:
    asked = secret.ask(SEEN, REQUEST)
    assert secret.verifier.accepts(asked.proof, SEEN, REQUEST)
    answer = JoinAnswer(membership="m", proof=secret.verifier.answer(SEEN, REQUEST, "m"))
    assert secret.believes(answer, SEEN, REQUEST)


def test_what_somebody_in_between_hears_is_of_no_use_to_them(code: str, secret: Secret) -> None:
    asked = secret.ask(OTHER, REQUEST)  # the device sees their certificate
    assert not secret.verifier.accepts(asked.proof, SEEN, REQUEST)
    assert not secret.verifier.accepts(secret.ask(SEEN, REQUEST).proof, SEEN, "their request")
    proof = secret.verifier.answer(SEEN, REQUEST, "m")
    assert not secret.believes(JoinAnswer(membership="m", proof=proof), OTHER, REQUEST)
    assert not secret.believes(JoinAnswer(membership="theirs", proof=proof), SEEN, REQUEST)
    assert not secret.believes(JoinAnswer(membership="m", proof=proof), SEEN, "their request")
    other_farm, other_code = Secret.of(code, "rice"), Secret.of(new_code(), "apple")
    for other in (other_farm, other_code):
        assert not secret.verifier.accepts(other.ask(SEEN, REQUEST).proof, SEEN, REQUEST)
        theirs = other.verifier.answer(SEEN, REQUEST, "m")
        assert not secret.believes(JoinAnswer(membership="m", proof=theirs), SEEN, REQUEST)


@pytest.mark.parametrize("proof", ["", "00", "zz" * 64, "00" * 64, "é"])
def test_a_proof_that_is_none_is_refused(secret: Secret, proof: str) -> None:
    assert not secret.verifier.accepts(proof, SEEN, REQUEST)


def test_what_the_server_keeps_says_nothing_when_shown(secret: Secret) -> None:
    assert secret.verifier.mac_key.hex() not in repr(secret)
    assert repr(secret.verifier.mac_key) not in repr(secret)
