package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// figures are the results of one run. Durations are in milliseconds or seconds
// as named, sizes in bytes. Over several runs the median counts, or what the
// tag runs says: what must not be hidden by two good runs of three.
type figures struct {
	Run      string   `json:"run"`
	Command  string   `json:"command"`
	Scenario string   `json:"scenario"`
	Nodes    int      `json:"nodes"`
	Sample   int      `json:"sample"`  // clients that decode their maps
	Peers    float64  `json:"peers"`   // that the average client may see
	IdleRSS  int64    `json:"idleRss"` // of the server before the first client, trimmed
	IdleLive int64    `json:"idleLive"`
	Join     *joining `json:"join,omitempty"`
	Change   *change  `json:"change,omitempty"`
	Burst    *burst   `json:"burst,omitempty"`
	Presence *outage  `json:"presence,omitempty"`
	Policy   *edit    `json:"policy,omitempty"`
	Restart  *restart `json:"restart,omitempty"`
	Steady   *steady  `json:"steady,omitempty"`
	Empty    *empty   `json:"empty,omitempty"`

	Faults     map[string]kind `json:"faults"`
	Warnings   map[string]kind `json:"warnings"`
	Complaints int             `json:"serverComplaints" runs:"max"` // warnings and errors in the server's log
}

type joining struct {
	Joined      int     `json:"joined" runs:"min"`
	PerSecond   float64 `json:"perSecond"`
	RegisterP50 float64 `json:"registerP50Ms"`
	RegisterP99 float64 `json:"registerP99Ms"`
	JoinP50     float64 `json:"joinP50Ms"`
	JoinP99     float64 `json:"joinP99Ms"`
	Converged   float64 `json:"convergedS"`       // from the first dial to the last view right; 0 = not in time
	Wrong       int     `json:"wrong" runs:"max"` // views not right when time was up
	ServerCPU   float64 `json:"serverCpuS"`
	LoadCPU     float64 `json:"loadCpuS"`
	PeakRSS     int64   `json:"peakRss"`
	Goroutines  int     `json:"goroutines"`
	BytesClient int64   `json:"bytesClient"`
	BytesPeer   float64 `json:"bytesPeer"` // to a client for each peer that it got to know
	FullMaps    int64   `json:"fullMaps"`  // that the server counted: one for each session
	Frames      int64   `json:"frames"`
	Broken      int     `json:"broken" runs:"max"`
	Revisions   int     `json:"revisions"` // database writes: transactions, or their equals in a shared one
}

type change struct {
	Changes     int     `json:"changes"`
	P50         float64 `json:"p50Ms"`
	P99         float64 `json:"p99Ms"`
	Max         float64 `json:"maxMs"`
	AckP50      float64 `json:"ackP50Ms"`
	CPU         float64 `json:"cpuMsChange"`
	BytesClient float64 `json:"bytesClientChange"`
	Missing     int     `json:"missing" runs:"max"` // deliveries that did not come in time
	Revisions   int     `json:"revisions"`
}

type burst struct {
	Changes   int     `json:"changes"`
	AllSeen   float64 `json:"allSeenS"`
	ServerCPU float64 `json:"serverCpuS"`
	Missing   int     `json:"missing" runs:"max"`
	Revisions int     `json:"revisions"`
}

type outage struct {
	Offline        float64 `json:"offlineMaxS"`
	Online         float64 `json:"onlineMaxS"`
	OfflineMissing int     `json:"offlineMissing" runs:"max"`
	OnlineMissing  int     `json:"onlineMissing" runs:"max"`
}

type edit struct {
	Edits       int     `json:"edits"`
	Viewers     int     `json:"viewers"` // whose filter an edit changes
	P50         float64 `json:"p50S"`
	Last        float64 `json:"lastS"`
	Ack         float64 `json:"ackS"`
	CPU         float64 `json:"cpuSEdit"`
	BytesClient float64 `json:"bytesClientEdit"`
	Missing     int     `json:"missing" runs:"max"`
}

type restart struct {
	Listening   float64 `json:"listeningS"`
	FirstMapP50 float64 `json:"firstMapP50S"`
	FirstMapMax float64 `json:"firstMapMaxS"`
	AllRight    float64 `json:"allRightS"` // 0 = not in time
	Wrong       int     `json:"wrong" runs:"max"`
	ServerCPU   float64 `json:"serverCpuS"`
	LoadCPU     float64 `json:"loadCpuS"`
	PeakRSS     int64   `json:"peakRss"`
	BytesClient int64   `json:"bytesClient"`
	Frames      int64   `json:"frames"`
	Broken      int     `json:"broken" runs:"max"`
	WentOffline int     `json:"wentOffline" runs:"max"` // nodes some viewer was told are offline
	Revisions   int     `json:"revisions"`
}

type steady struct {
	Wall       float64 `json:"wallS"`
	ServerCPU  float64 `json:"serverCpuS"`
	RSS        int64   `json:"rss"`
	TrimmedRSS int64   `json:"trimmedRss"` // after a collection, free memory given back; 0 = the server cannot be asked
	// A client's share of what is above the idle server.
	RSSClient     int64 `json:"rssClient"`
	TrimmedClient int64 `json:"trimmedClient"`
	LiveClient    int64 `json:"liveClient"` // heap and stacks in use after a collection
	Goroutines    int   `json:"goroutines"`
}

// empty is a server that knows all nodes and holds no session.
type empty struct {
	Listening  float64 `json:"listeningS"`
	TrimmedRSS int64   `json:"trimmedRss"`
}

// wrong says what was not right, in one line; "" for a good run.
func (f *figures) wrong() string {
	var out []string
	if j := f.Join; j == nil || j.Joined < f.Nodes {
		out = append(out, "not all joined")
	} else if j.Wrong > 0 {
		out = append(out, fmt.Sprintf("%d views not right in time after the joins", j.Wrong))
	}
	for _, name := range slices.Sorted(maps.Keys(f.Faults)) {
		out = append(out, fmt.Sprintf("%s: %d", name, f.Faults[name].Count))
	}
	return strings.Join(out, "; ")
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
