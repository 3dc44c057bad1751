"""What a device believes: who signed, what, and as which kind of document."""

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RefusalError, RefuseReason
from common.signing import MAX_BYTES, KeySet, TrustedKey, first_keys, read, sign, verified

NOW = datetime(2026, 6, 1, tzinfo=UTC)
KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def key_set(*keys: TrustedKey, counter: int = 1, network: str = "valley") -> KeySet:
    return KeySet(network=network, counter=counter, keys=keys or (TrustedKey.of(KEY),))


def refusal(text: str, keys: KeySet | None = None, now: datetime = NOW) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        verified("manifest", text, keys or key_set(), now)
    return caught.value


def test_what_was_signed_is_read_again() -> None:
    document = sign("manifest", key_set(counter=7), [KEY])
    assert read(KeySet, "manifest", document, key_set(), NOW) == key_set(counter=7)


@settings(deadline=None)
@given(st.data())
def test_no_changed_character_passes(data: st.DataObject) -> None:
    document = sign("manifest", key_set(), [KEY])
    place = data.draw(st.integers(0, len(document) - 1))
    other = data.draw(st.characters(codec="ascii").filter(lambda c: c != document[place]))
    changed = document[:place] + other + document[place + 1 :]
    try:
        body = verified("manifest", changed, key_set(), NOW)
    except RefusalError:
        return
    # base64 has bits that mean nothing, and JSON has more than one way to write a character
    assert body == json.loads(document)["body"]


def test_a_changed_body_says_so() -> None:
    envelope = json.loads(sign("manifest", key_set(), [KEY]))
    envelope["body"] = envelope["body"].replace("valley", "alley")
    error = refusal(json.dumps(envelope))
    assert error.reason is RefuseReason.TAMPERED
    assert "was changed on its way" in str(error)


def test_a_channel_cannot_be_shown_as_a_manifest() -> None:
    assert refusal(sign("channel", key_set(), [KEY])).reason is RefuseReason.TAMPERED


def test_no_signature() -> None:
    error = refusal(sign("manifest", key_set(), []))
    assert error.reason is RefuseReason.UNSIGNED
    assert "carries no signature" in str(error)


def test_a_foreign_key() -> None:
    error = refusal(sign("manifest", key_set(), [OTHER]))
    assert error.reason is RefuseReason.WRONG_KEY
    assert "no key of network 'valley'" in str(error)
    assert "enrol it again" in str(error)


def test_a_false_signature_beside_a_true_one() -> None:
    both = key_set(TrustedKey.of(KEY), TrustedKey.of(OTHER))
    envelope = json.loads(sign("manifest", key_set(), [KEY, OTHER]))
    name = TrustedKey.of(OTHER).id
    envelope["signatures"][name] = base64.b64encode(bytes(64)).decode()
    assert refusal(json.dumps(envelope), both).reason is RefuseReason.TAMPERED


def test_a_key_that_counts_no_longer_names_the_date() -> None:
    old = key_set(TrustedKey.of(KEY, until=NOW))
    document = sign("manifest", key_set(), [KEY])
    assert verified("manifest", document, old, NOW - timedelta(seconds=1))
    error = refusal(document, old)
    assert error.reason is RefuseReason.EXPIRED
    assert "2026-06-01" in str(error)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"body": 1, "signatures": {}}', "\x00", "{" * 5000]
)
def test_what_is_no_document(text: str) -> None:
    assert refusal(text).reason is RefuseReason.MALFORMED


def test_an_unknown_field_in_a_document_that_is_signed() -> None:
    class Wider(KeySet):
        colour: str = "green"

    wider = Wider(network="valley", counter=1, keys=(TrustedKey.of(KEY),))
    with pytest.raises(RefusalError, match="colour") as caught:
        read(KeySet, "keys", sign("keys", wider, [KEY]), key_set(), NOW)
    assert caught.value.reason is RefuseReason.MALFORMED


def test_a_document_without_end() -> None:
    assert refusal("x" * (MAX_BYTES + 1)).reason is RefuseReason.TOO_LARGE


# --- keys that are exchanged -----------------------------------------------------------------


def test_a_new_key_counts_when_the_old_one_vouches_for_it() -> None:
    newer = key_set(TrustedKey.of(KEY, NOW), TrustedKey.of(OTHER), counter=2)
    assert key_set().follow(sign("keys", newer, [KEY, OTHER]), NOW) == newer
    with pytest.raises(RefusalError) as caught:
        key_set().follow(sign("keys", newer, [OTHER]), NOW)
    assert caught.value.reason is RefuseReason.WRONG_KEY


def test_an_old_key_set_is_refused() -> None:
    current = key_set(TrustedKey.of(KEY), TrustedKey.of(OTHER), counter=2)
    with pytest.raises(RefusalError, match="number 1 are older than number 2") as caught:
        current.follow(sign("keys", key_set(), [KEY]), NOW)
    assert caught.value.reason is RefuseReason.OLDER
    assert current.follow(sign("keys", current, [KEY, OTHER]), NOW) == current


def test_keys_of_another_network() -> None:
    with pytest.raises(RefusalError, match="'hill', but this device belongs to 'valley'") as caught:
        key_set().follow(sign("keys", key_set(network="hill"), [KEY]), NOW)
    assert caught.value.reason is RefuseReason.FOREIGN


def test_first_keys_have_signed_themselves() -> None:
    assert first_keys(sign("keys", key_set(), [KEY]), NOW) == key_set()
    with pytest.raises(RefusalError):
        first_keys(sign("keys", key_set(), [OTHER]), NOW)
