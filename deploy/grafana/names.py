"""Every name of a metric that the dashboards show, in one table; what is renamed is renamed here.

``Server`` is shown by ``server/families.py``, ``Device`` at a device's own endpoint, ``Recorded``
by ``deploy/prometheus/rules``, ``Prometheus`` is Prometheus's own.
"""

from enum import StrEnum
from typing import Final

SERVER_JOB: Final = "fieldfed"
"""The job that scrapes the server (deploy/prometheus/prometheus.yml)."""
DEVICE_JOB: Final = "fieldfed-device"
"""The job that scrapes devices; each target is labelled ``device: NAME`` there."""


class Server(StrEnum):
    """Names at the server."""

    BUILD = "fieldfed_build_info"
    UP_SOURCE = "fieldfed_up_source"

    RUN = "fieldfed_run_number"
    RUN_STATE = "fieldfed_run_state"
    RUNS = "fieldfed_runs_total"
    ROUNDS = "fieldfed_rounds_total"  # by outcome
    ROUND_SECONDS = "fieldfed_round_duration_seconds_bucket"
    ROUND = "fieldfed_round_number"
    ROUND_OPEN = "fieldfed_round_open"
    ROUND_REPLIES = "fieldfed_round_participants"
    ROUND_QUORUM = "fieldfed_round_quorum"
    ROUND_DEADLINE = "fieldfed_round_deadline_timestamp_seconds"
    CUTS = "fieldfed_cuts_total"  # by outcome

    REJECTED = "fieldfed_replies_rejected_total"  # by reason
    STALENESS = "fieldfed_reply_staleness_rounds_bucket"
    STALENESS_COUNT = "fieldfed_reply_staleness_rounds_count"
    MESSAGE_BYTES = "fieldfed_message_bytes_total"  # by direction
    LINK_BYTES = "fieldfed_link_bytes_total"  # by direction

    FARMS = "fieldfed_farms"  # by state
    ACCURACY = "fieldfed_farm_accuracy_ratio"  # by farm and part
    F1 = "fieldfed_farm_f1_ratio"  # by farm and part
    FARM_SEEN = "fieldfed_farm_last_seen_timestamp_seconds"  # by farm

    HEADS = "fieldfed_heads_kept"  # by block
    NEURONS = "fieldfed_neurons_kept"  # by block
    MACS = "fieldfed_macs_ratio"
    HEAD_SCORE = "fieldfed_head_score"  # by block and head
    CORRELATION = "fieldfed_score_rank_correlation"

    COMMITTED = "fieldfed_last_commit_timestamp_seconds"
    STORE_BYTES = "fieldfed_store_size_bytes"

    VERSION = "fieldfed_newest_version"
    CHANNEL_VERSION = "fieldfed_channel_version"  # by channel
    CHANNEL_ENDS = "fieldfed_channel_expiry_timestamp_seconds"  # by channel
    ROLLOUT_SHARE = "fieldfed_rollout_share_ratio"  # by channel
    INSTALLS = "fieldfed_installs_total"  # by outcome
    CERTIFICATE_ENDS = "fieldfed_certificate_expiry_timestamp_seconds"  # by holder

    DEVICES = "fieldfed_devices"  # by state
    DEVICE_SEEN = "fieldfed_device_last_seen_timestamp_seconds"  # by device
    DEVICE_OUTBOX = "fieldfed_device_outbox_messages"  # by device
    TELEMETRY = "fieldfed_telemetry_messages_total"  # by outcome


class Device(StrEnum):
    """Names at a device's own endpoint."""

    VERSION = "fieldfed_device_version"
    TEMPERATURE = "fieldfed_device_temperature_celsius"
    DISK_FREE = "fieldfed_device_disk_free_bytes"
    LINK_BYTES = "fieldfed_device_link_bytes_total"  # by direction


class Recorded(StrEnum):
    """Names of recording rules."""

    BAD_SHARE = "instance:fieldfed_replies_bad:ratio1d"
    ACCURACY = "instance_farm:fieldfed_farm_accuracy_ratio:avg6h"


class Prometheus(StrEnum):
    """Names that Prometheus makes itself."""

    UP = "up"
    ALERTS = "ALERTS"
